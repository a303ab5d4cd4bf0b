"""What a compiled program sends between devices, read from the compiler's own text.

Each collective is counted with the loops around it: the compiler notes how often a loop runs where
that is known. A loop of unknown length (the steps of a decode dispatch) counts once.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(
    rf"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})"
    r"(?P<half>-start|-done)?\((?P<operands>.*?)\)"
)
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)="
    r"%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"^\s+%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_LIMIT = re.compile(r"^\s+ROOT %?[\w.-]+ = pred\[\]\S* compare\([^,]*, %?([\w.-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One operation of the text.

    Attributes:
      kind: one of `KINDS`.
      shape: its result on one device, as the compiler writes it.
      bytes: of that result; of what went in where that is more (reduce-scatter).
      group: devices that exchange with each other.
      times: how often it runs, by the loops around it.
    """

    kind: str
    shape: str
    bytes: int
    group: int
    times: int

    @property
    def received(self) -> int:
        """Bytes that reach one device each time, by the usual ring."""
        rest = self.bytes * (self.group - 1) / self.group
        other = {"all-reduce": 2 * rest, "collective-permute": self.bytes}
        return round(other.get(self.kind, rest))

    @property
    def total(self) -> int:
        """Bytes that reach one device in a run of the program."""
        return self.received * self.times


def array_bytes(text: str) -> int:
    """Bytes of all arrays in a type such as '(bf16[2,8]{1,0}, f32[])'; layouts are not counted."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _item_bytes(kind)
        for kind, dims in _ARRAY.findall(text)
    )


def _item_bytes(kind: str) -> int:
    if kind == "pred":
        return 1
    return max(1, int(re.match(r"[a-z]+(\d+)", kind)[1]) // 8)


def _group(line: str, devices: int) -> int:
    """Devices of a replica group, in any of the three ways the compiler writes them."""
    if found := _MESH.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return devices


def _bodies(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the one that begins it all is also under ''."""
    found: dict[str, list[str]] = {"": []}
    lines = found[""]
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = found[header[1]] = []
            if line.startswith("ENTRY"):
                found[""] = lines
        else:
            lines.append(line)
    return found


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often the loop of a `while` runs; 1 where the text does not say.

    The compiler notes it, or the loop's condition compares its counter, which begins at 0, with a
    constant.
    """
    if noted := _TRIPS.search(line):
        return int(noted[1])
    condition = bodies.get(found[1], []) if (found := _CONDITION.search(line)) else []
    constants = dict(match.groups() for each in condition if (match := _CONSTANT.match(each)))
    for each in condition:
        if limit := _LIMIT.match(each):
            return int(constants.get(limit[1], 1))
    return 1


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    entry = next(name for name in bodies if name and bodies[name] is bodies[""])
    for inside, lines in bodies.items():
        for line in lines if inside else ():
            called = _CALLED.findall(line)
            for names in _BRANCHES.findall(line):
                called += re.findall(r"%?([\w.-]+)", names)
            trips = _trips(line, bodies) if " while(" in line else 1
            for name in called:
                callers[name].append((inside, trips))
    counted: dict[str, int] = {entry: 1}

    def count(name: str) -> int:
        if name not in counted:
            counted[name] = sum(count(caller) * trips for caller, trips in callers[name])
        return counted[name]

    return {name: count(name) for name in bodies if name}


def parse(text: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      devices: of the whole mesh, for collectives that name no group.
    """
    bodies = _bodies(text)
    times, groups = _times(bodies), {}
    seen: set[str] = set()
    found: list[Collective] = []
    for inside, line in ((name, line) for name, lines in bodies.items() if name for line in lines):
        if not (operation := _OPERATION.match(line)):
            continue
        if operation["half"] == "-start":  # its type holds operands too: the other half has it
            groups[operation["name"]] = _group(line, devices)
            continue
        # A TPU splits a gather into a chain of fused computations that all repeat it.
        if chain := _CHAIN.search(line):
            if chain[1] in seen:
                continue
            seen.add(chain[1])
        start = operation["operands"].strip().lstrip("%")
        group = groups.get(start) if operation["half"] else _group(line, devices)
        kind, size = operation["kind"], array_bytes(operation["type"])
        if "all-reduce-scatter" in inside:  # a TPU's way to write a reduce-scatter
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= group or 1
        shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", operation["type"])
        found.append(Collective(kind, shape, size, group or devices, times.get(inside, 1)))
    return [one for one in found if one.group > 1]
