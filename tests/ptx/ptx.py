"""PTX as machine.c wants it: instructions with a number for each operation and a row for each operand.

Rows are registers. The first ones are what a thread is told about itself, then come constants: the arguments of the
launch, numbers in the code and addresses of texts. What is not known here or in instructions.h is an error, so that
nothing is carried out in another way than it is meant.
"""

import ctypes
import re

import numpy as np

# As in machine.c.
ALU, CONTROL, GLOBAL, SHARED, SYNC, BARRIER = range(6)
SPECIAL = ["%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x"]
ZERO, CONSTANTS = len(SPECIAL), len(SPECIAL) + 1
INSTRUCTION = np.dtype(
    [(name, np.int32) for name in ("operation", "kind", "line", "begins", "guard", "negated", "size", "count")]
    + [(name, np.int32) for name in ("is_signed", "strong", "fences", "offset", "target")]
    + [("to", np.int32, 4), ("from", np.int32, 5)]
)
# What may stand between the operation and the type of an access; the table of operations holds all else.
MODIFIERS = {"global", "shared", "gpu", "cta", "sys", "relaxed", "weak", "volatile", "acquire", "release", "acq_rel"}
MODIFIERS |= {"v2", "v4", "L1::evict_last", "L1::evict_first"}
ATOMICS = {"add", "min", "max", "and", "or", "xor", "exch", "cas"}


class PtxError(RuntimeError):
    """A kernel does what a GPU would not do, or not promise to do well; or something that is not known here."""


def split(text):
    """Operands, split at the commas that are not inside of brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text) if part.strip()]


class Program:
    """The kernel in a PTX text, decoded with the numbers of operations by name."""

    def __init__(self, ptx, operations):
        self.operations, self.name, self.num_arguments = operations, None, 0
        self.rows, self.constants, self.texts, self.labels, self.sources = {}, {}, {}, {}, {}
        statements = list(self._statements(ptx))
        # Constants come before registers, so they have to be known first: decode twice.
        for _ in range(2):
            self._constants = len(self.constants)
            self.rows = {}
            self.code = np.zeros(len(statements) + 1, INSTRUCTION)
            for instruction, statement in zip(self.code, statements, strict=False):
                self._decode(instruction, *statement)
        self.code["begins"][[*self.labels.values(), -1]] = 1
        self.num_rows = CONSTANTS + self._constants + len(self.rows)

    def values(self, arguments):
        """The constants, in their order, in a launch with such arguments (64 bits each)."""
        return np.array([arguments[key[1]] if isinstance(key, tuple) else key for key in self.constants], np.uint64)

    def place(self, line):
        """A line of the PTX, and that of the source from which it was made."""
        source, text = self.sources.get(line, ("?", ""))
        return f"line {line} ({source}): {text}"

    # ---- parsing

    def _statements(self, ptx):
        """Line, predicate, name and operands of each instruction; notes declarations and labels on the way."""
        source, count = "?", 0
        for line, written in enumerate(ptx.splitlines(), 1):
            text, _, comment = written.partition("//")
            text = text.strip()
            if text.startswith(".loc"):
                source = comment.strip() or source
            elif found := re.match(r"\.global .*\.b8 ([\w$]+)\[\d+\] = \{([\d, ]*)\}", text):
                self.texts[found[1]] = ctypes.create_string_buffer(bytes(map(int, found[2].split(","))))
            elif found := re.match(r"\.extern \.shared .* (\w+)\[\]", text):
                self.texts[found[1]] = None
            elif found := re.match(r"\.visible \.entry (\w+)", text):
                if self.name:
                    raise PtxError("more than one kernel in a text")
                self.name = found[1]
            elif self.name and text.startswith(".param") and "_param_" in text:
                self.num_arguments += 1
            elif text.startswith((".file", ".section")):
                return
            elif found := re.fullmatch(r"([$\w]+):", text):
                self.labels[found[1]] = count
            elif re.match(r"\.(shared|const|func|global)", text):
                raise PtxError(f"line {line}: unknown declaration: {text}")
            elif self.name:
                for statement in filter(None, map(str.strip, re.sub(r"^\{ (.*) \}$", r"\1", text).split(";"))):
                    if re.match(r"[{}(),]|\.(reg|param|pragma|reqntid|maxntid|minnctapersm|noreturn)\b", statement):
                        continue
                    found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
                    if not found:
                        raise PtxError(f"line {line}: cannot read: {statement}")
                    self.sources[line] = source, statement
                    count += 1
                    yield line, found[1], found[2].replace("shared::cta", "shared"), split(found[3])

    # ---- decoding

    def _constant(self, key):
        return CONSTANTS + self.constants.setdefault(key, len(self.constants))

    def _row(self, operand):
        """The row of an operand."""
        if operand in SPECIAL:
            return SPECIAL.index(operand)
        if operand in ("%tid.y", "%tid.z"):
            return ZERO
        if operand in self.texts:
            text = self.texts[operand]
            return self._constant(ctypes.addressof(text) if text else 0)
        if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]{8,16})", operand):
            return self._constant(int(found[1], 16))
        if found := re.fullmatch(r"(-?(0x[0-9A-Fa-f]+|\d+))U?", operand):
            return self._constant(int(found[1], 0) & 2**64 - 1)
        if found := re.fullmatch(r"\[\w+_param_(\d+)\]", operand):
            return self._constant(("argument", int(found[1])))
        if found := re.fullmatch(r"\[?(%[a-z]+\d+|param\d|tmp|_)\]?", operand):
            return CONSTANTS + self._constants + self.rows.setdefault(found[1], len(self.rows))
        raise PtxError(f"unknown operand {operand}")

    def _address(self, i, operand):
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        i["from"][0], i["offset"] = self._row(found[1]), int(found[2] or 0)

    def _decode(self, i, line, predicate, name, operands):
        nowhere = self._row("_")  # what is written there, nobody reads
        i["line"], i["guard"], i["target"], i["to"] = line, -1, -1, nowhere
        if predicate:
            i["guard"], i["negated"] = self._row(predicate.lstrip("!")), predicate[0] == "!"
        parts = name.split(".")
        try:
            if parts[0] in ("ld", "st", "atom", "red") and parts[1] != "param":
                name = self._access(i, parts, operands)
            elif parts[0] in ("membar", "fence"):
                name, i["kind"] = "fence", GLOBAL
            elif parts[0] in ("shfl", "redux", "bar", "barrier", "ldmatrix"):
                name = self._together(i, parts, operands)
            else:
                name = self._single(i, parts, operands)
            i["operation"] = self.operations[re.sub(r"\W", "_", name)]
        except (KeyError, IndexError, TypeError, ValueError, PtxError) as error:
            raise PtxError(f"line {line}: not known: {'.'.join(parts)} {', '.join(operands)} ({error})") from error

    def _single(self, i, parts, operands):
        """What each thread does by itself: the result comes first, or of a call nothing."""
        name = ".".join(parts)
        if parts[0] in ("bra", "ret", "exit"):
            i["kind"] = CONTROL
            if operands:
                i["target"] = self.labels[operands[0]]
        elif parts[0] == "call":
            if operands[0] != "__assertfail":
                raise PtxError("call")
            i["from"][0] = self._row("param0")
        elif operands:
            to, *sources = operands
            if to[0] == "{":
                name, targets = f"unpack.b{parts[1][1:]}", split(to[1:-1])
            else:
                targets = [to]
            if sources[0][0] == "{":
                name, sources = f"pack.b{parts[1][1:]}", split(sources[0][1:-1])
            if len(targets) > 1 + (to[0] == "{") or len(sources) > 3:
                raise PtxError("operands")
            for place, target in enumerate(targets):
                i["to"][place] = self._row(target)
            for place, source in enumerate(sources):
                i["from"][place] = self._row(source)
        return name

    def _access(self, i, parts, operands):
        """An access to memory: `from` holds the address, then what is stored."""
        action, kind = parts[0], parts[-1]
        i["kind"] = SHARED if "shared" in parts else GLOBAL
        i["size"], i["is_signed"], i["count"] = int(kind[1:]) // 8, kind[0] == "s", 1
        i["strong"] = bool({"relaxed", "volatile", "acquire"} & set(parts))
        i["fences"] = "acq_rel" in parts
        atomic = ATOMICS & set(parts)
        if set(parts[1:-1]) - MODIFIERS - atomic or len(atomic) != (action in ("atom", "red")):
            raise PtxError("modifiers")
        if action == "red":
            operands = ["_", *operands]
        if action in ("ld", "atom", "red"):
            results, address, *values = operands
        else:
            address, values = operands
            results = "{}"
            values = split(values.strip("{}"))
        self._address(i, address)
        results = split(results.strip("{}"))
        for place, result in enumerate(results):
            i["to"][place] = self._row(result)
        for place, value in enumerate(values, 1):
            i["from"][place] = self._row(value)
        if atomic:
            if i["kind"] == SHARED:
                raise PtxError("shared")
            return f"atomic.{atomic.pop()}.{kind}"
        i["count"] = max(len(results), len(values))
        return "load" if action == "ld" else "store"

    def _together(self, i, parts, operands):
        """What threads of a warp or block do together: last comes which threads of a warp."""
        if i["guard"] >= 0:
            raise PtxError("predicate")
        i["kind"] = SYNC
        everyone = self._constant(2**32 - 1)
        if parts[0] == "ldmatrix":
            if parts[1:4] != ["sync", "aligned", "m8n8"] or parts[5:] != ["shared", "b16"]:
                raise PtxError("form")
            targets = split(operands[0][1:-1])
            i["count"] = len(targets)
            i["to"][: len(targets)] = [self._row(target) for target in targets]
            self._address(i, operands[1])
            i["from"][4] = everyone
            return "ldmatrix"
        if parts[:2] == ["bar", "warp"]:
            i["from"][4] = self._row(operands[0])
            return "bar.warp.sync"
        if parts[0] in ("bar", "barrier"):
            if operands != ["0"]:
                raise PtxError("barrier")
            i["kind"] = BARRIER
            return "bar.sync"
        to, *sources, mask = operands
        i["to"][0] = self._row(to)
        for place, source in enumerate(sources):
            i["from"][place] = self._row(source)
        i["from"][4] = self._row(mask)
        return ".".join(parts)
