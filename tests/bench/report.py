"""The report of a benchmark run: a table for people, JSON for programs."""

import json
import os
import platform
from statistics import median

from rows import FIRST_BYTE, MEMORY, MEMORY_AFTER, MEMORY_ROWS, OURS, SIGNS, TABLE_MEMORY

METRICS = ("iops", "mb_per_s", "server_cpu_us", "p50_us", "p99_us", "client_busy")
CLIENT_BOUND = 0.95  # a client busier than this may be what limits the figure


def number(value, digits=0):
    return "-" if value is None else f"{value:,.{digits}f}"


def times(value):
    return "-" if value is None else f"x{value:.2f}"


def print_row(bench, row):
    for server in bench.servers:
        rounds = [round for round in bench.results[row].get(server.name, []) if round]
        if server.name not in bench.results[row]:
            continue
        if not rounds:
            print(f"{row:<20} {server.name:<17} {'failed':>9}")
            continue

        def of(metric, name=server.name):
            return bench.middle(row, name, metric)

        iops = [round["iops"] for round in rounds]
        spread = (max(iops) - min(iops)) / 2 / median(iops) * 100
        ratios = ["", ""]
        if not server.name.startswith(OURS):
            ratios = [bench.ratio(row, server.name, name) for name in ("iops", "server_cpu_us")]
            ratios = [times(ratio) for ratio in ratios]
        busy = of("client_busy")
        line = (
            f"{row:<20} {server.name:<17} {number(of('iops')):>9} {number(of('mb_per_s')):>7} "
            f"{spread:>4.0f}% {number(of('server_cpu_us'), 2):>8} "
            f"{number(of('p50_us')):>7} {number(of('p99_us')):>7} "
            f"{busy * 100:>4.0f}%{'!' if busy > CLIENT_BOUND else ' '} "
            f"{ratios[0]:>7} {ratios[1]:>7}"
        )
        print(line.rstrip())
    print()


def print_memory(bench):
    titles = {MEMORY: "after start", MEMORY_AFTER: "after one client", TABLE_MEMORY: "8 MiB of tables"}
    columns = [row for row in MEMORY_ROWS if row in bench.memory]
    print(f"{'KiB':<17} {'   '.join(f'{titles[row]:>27}' for row in columns)}")
    names = f"{'private':>8} {'pss':>8} {'rss':>9}"
    print(f"{'':<17} {'   '.join(names for _ in columns)}")
    for server in bench.servers:
        if not any(server.name in bench.memory[row] for row in columns):
            continue
        cells = []
        for row in columns:
            found = bench.memory.get(row, {}).get(server.name, {})
            private, pss, rss = (number(found.get(kind)) for kind in ("private", "pss", "rss"))
            cells.append(f"{private:>8} {pss:>8} {rss:>9}")
        print(f"{server.name:<17} {'   '.join(cells)}")
    print()


def print_first_byte(bench):
    print(f"{'ms to first byte':<17} {'median':>8} {'fastest':>8} {'slowest':>8} {'blkstackd':>10}")
    for server in bench.servers:
        if "raw" not in server.setups:
            continue
        taken = [value / 1000 for value in bench.first_byte.get(server.name, []) if value]
        if not taken:
            print(f"{server.name:<17} {'failed':>8}")
            continue
        ratio = ""
        if not server.name.startswith(OURS):
            ratio = times(bench.ratio(FIRST_BYTE, server.name, ""))
        line = f"{median(taken):>8.2f} {min(taken):>8.2f} {max(taken):>8.2f} {ratio:>10}"
        print(f"{server.name:<17} {line}".rstrip())
    print()


def describe(target):
    words = {"iops": "IOPS", "server_cpu_us": "CPU/request", "memory_kib": "Pss KiB"}
    what = words.get(target.metric, "time")
    limit = f"{SIGNS[target.holds]} {target.limit:g}"
    return f"{target.row:<25} {what:<12} {limit}" + (f" x {target.peer}" if target.peer else "")


def print_report(bench):
    options = bench.options
    print(
        f"image of {options.size} on {options.dir}, {options.rounds} rounds of "
        f"{options.seconds:g} s, medians, seed {options.seed}; "
        f"{os.cpu_count()} processors, Linux {platform.release()}\n"
    )
    if bench.results:
        print(
            f"{'':<61} {'CPU us':>8} {'p50':>7} {'p99':>7} {'client':>6} {'blkstackd here':>15}\n"
            f"{'row':<20} {'server':<17} {'IOPS':>9} {'MB/s':>7} {'+-':>4} "
            f"{'/request':>9} {'us':>7} {'us':>7} {'busy':>6} {'IOPS':>7} {'CPU':>7}\n"
        )
        for row in bench.results:
            print_row(bench, row)
    if bench.memory:
        print_memory(bench)
    if bench.first_byte:
        print_first_byte(bench)
    verdicts = bench.judge()
    if verdicts and any(server.name == OURS for server in bench.servers):
        print("targets")
        for target, figure, met in verdicts:
            word = "not measured" if figure is None else "met" if met else "MISSED"
            shown = times(figure) if target.peer else number(figure)
            print(f"  {describe(target):<60} {shown:>8}  {word}")
        print(f"  {sum(met for *_, met in verdicts)} of {len(verdicts)} met\n")
    for note in bench.notes:
        print(f"note: {note}")


def write_json(bench, path):
    rows = {
        row: {
            server: {
                "median": {metric: bench.middle(row, server, metric) for metric in METRICS},
                "blkstackd_ratio": {
                    metric: bench.ratio(row, server, metric) for metric in ("iops", "server_cpu_us")
                },
                "rounds": rounds,
            }
            for server, rounds in servers.items()
        }
        for row, servers in bench.results.items()
    }
    targets = [
        {
            "row": target.row,
            "metric": target.metric,
            "peer": target.peer,
            "sign": SIGNS[target.holds],
            "limit": target.limit,
            "figure": figure,
            "met": met,
        }
        for target, figure, met in bench.judge()
    ]
    document = {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "size": bench.options.size,
        "rounds": bench.options.rounds,
        "seconds": bench.options.seconds,
        "seed": bench.options.seed,
        "rows": rows,
        "memory_kib": bench.memory,
        "first_byte_us": bench.first_byte,
        "targets": targets,
        "notes": bench.notes,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
