"""A small reader of Varlink's interface description language, and a check of values against its types.

Types come out as: 'bool' 'int' 'float' 'string' 'object', a name, ('?', type), ('[]', type),
('{}', type) for maps, ('enum', names), ('struct', {name: type}).
"""
import re

TOKEN = re.compile(r'\s+|#[^\n]*|(?P<token>\[string\]|\[\]|->|[?():,]|[A-Za-z][A-Za-z0-9_.-]*)')
TYPE_NAME = re.compile(r'[A-Z][A-Za-z0-9]*$')
FIELD_NAME = re.compile(r'[A-Za-z](_?[A-Za-z0-9])*$')
INTERFACE_NAME = re.compile(r'[A-Za-z](-*[A-Za-z0-9])*(\.[A-Za-z0-9](-*[A-Za-z0-9])*)+$')
BUILT_IN = ('bool', 'int', 'float', 'string', 'object')


class Interface:
    """name; types, errors: {name: type}; methods: {name: (parameters, reply)}, all of them structs."""

    def __init__(self, text):
        self.tokens = list(tokenize(text))
        self.types, self.methods, self.errors = {}, {}, {}
        self.expect('interface')
        self.name = self.take(INTERFACE_NAME)
        while self.tokens:
            kind = self.tokens.pop(0)
            table = {'type': self.types, 'method': self.methods, 'error': self.errors}[kind]
            name = self.take(TYPE_NAME)
            if name in table:
                raise ValueError(f'{kind} {name} is there twice')
            table[name] = self.struct_or_enum()
            if kind == 'method':
                self.expect('->')
                table[name] = table[name], self.struct_or_enum()
            elif kind == 'error' and table[name] == ('enum', []):
                table[name] = 'struct', {}
        self.methods = {name: tuple(('struct', {}) if part == ('enum', []) else part for part in parts)
                        for name, parts in self.methods.items()}
        self.check_names()

    def expect(self, token):
        got = self.tokens.pop(0)
        if got != token:
            raise ValueError(f'expected {token}, found {got} before {self.tokens[:5]}')

    def take(self, pattern):
        name = self.tokens.pop(0)
        if not pattern.match(name):
            raise ValueError(f'{name} is no name for what stands here')
        return name

    def type(self):
        token = self.tokens[0]
        if token in ('?', '[]', '[string]'):
            self.tokens.pop(0)
            inner = self.type()
            if token == '?' and inner[0] == '?':
                raise ValueError('?? is no type')
            return {'[string]': '{}'}.get(token, token), inner
        if token == '(':
            return self.struct_or_enum()
        return self.tokens.pop(0)

    def struct_or_enum(self):
        self.expect('(')
        fields, names = {}, []
        while self.tokens[0] != ')':
            if fields or names:
                self.expect(',')
            name = self.take(FIELD_NAME)
            if name in fields or name in names:
                raise ValueError(f'{name} is there twice')
            if self.tokens[0] == ':':
                self.expect(':')
                fields[name] = self.type()
            else:
                names.append(name)
        self.expect(')')
        if fields and names:
            raise ValueError(f'{names} have no type')
        return ('struct', fields) if fields else ('enum', names)

    def check_names(self):
        """Every type that is named is declared, and every type declared is used."""
        used = set()

        def walk(kind):
            if isinstance(kind, str):
                if kind not in BUILT_IN and kind not in self.types:
                    raise ValueError(f'type {kind} is not declared')
                used.add(kind)
            elif kind[0] == 'struct':
                for inner in kind[1].values():
                    walk(inner)
            elif kind[0] != 'enum':
                walk(kind[1])

        for kind in [*self.types.values(), *self.errors.values(),
                     *(part for parts in self.methods.values() for part in parts)]:
            walk(kind)
        unused = set(self.types) - used
        if unused:
            raise ValueError(f'types that nobody uses: {unused}')

    def mismatch(self, value, kind, place='reply'):
        """What is wrong with a value of that type, or None."""
        if isinstance(kind, str) and kind in self.types:
            return self.mismatch(value, self.types[kind], place)
        if isinstance(kind, str):
            fits = {'bool': isinstance(value, bool), 'string': isinstance(value, str),
                    'int': isinstance(value, int) and not isinstance(value, bool),
                    'float': isinstance(value, (int, float)) and not isinstance(value, bool),
                    'object': isinstance(value, dict)}[kind]
            return None if fits else f'{place}: {value!r} is no {kind}'
        shape, inner = kind
        if shape == '?':
            return None if value is None else self.mismatch(value, inner, place)
        if shape == 'enum':
            return None if value in inner else f'{place}: {value!r} is none of {inner}'
        if shape == '[]':
            if not isinstance(value, list):
                return f'{place}: {value!r} is no array'
            found = (self.mismatch(item, inner, f'{place}[{i}]') for i, item in enumerate(value))
            return next(filter(None, found), None)
        if not isinstance(value, dict):
            return f'{place}: {value!r} is no object'
        if shape == '{}':
            found = (self.mismatch(item, inner, f'{place}.{key}') for key, item in value.items())
            return next(filter(None, found), None)
        unknown = set(value) - set(inner)
        if unknown:
            return f'{place}: {unknown} are not declared'
        found = (self.mismatch(value.get(name), field, f'{place}.{name}')
                 for name, field in inner.items())
        return next(filter(None, found), None)


def tokenize(text):
    at = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise ValueError(f'cannot read {text[at:at + 40]!r}')
        if match['token']:
            yield match['token']
        at = match.end()
