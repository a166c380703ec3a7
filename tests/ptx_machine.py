"""The lanes, memory and scheduling of tests/ptx_executor.py, and the launch of a parsed kernel."""

from __future__ import annotations

import re
import struct

import numpy as np
from ptx_executor import LANES, PLAIN, SHARED_TAG, TAG, Fault, Instruction, Kernel, compare, convert, dtype_of, of_pairs

BASE = 4096  # the view of the process's memory begins there


class Memory:
    """All of the process's memory, as arrays of each width."""

    def __init__(self, width: int) -> None:
        shape = (2**47 // width - BASE // width,)
        self.__array_interface__ = {"data": (BASE, False), "shape": shape, "typestr": f"<u{width}", "version": 3}


GLOBAL = {width: np.asarray(Memory(width)) for width in (1, 2, 4, 8)}
ENDS = ("bra", "ret", "exit", "brx")
WAITS = ("bar", "barrier", "shfl", "vote", "mma", "ldmatrix")  # for other lanes
SPACES = ("global", "shared", "shared::cta", "local", "param", "const")


class Regions:
    """Which bytes a launch may touch: (start, bytes, use), use being 0 read, 1 write, 2 both."""

    def __init__(self, given: list[tuple[int, int, int]]) -> None:
        # what is written may be read back
        self.ends = {False: self.merged(given), True: self.merged([each for each in given if each[2] != 0])}

    @staticmethod
    def merged(given: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        spans: list[list[int]] = []
        for start, size, _ in sorted(given):
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], start + size)
            else:
                spans.append([start, start + size])
        table = np.array(spans, np.uint64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def allow(self, address: np.ndarray, size: int, write: bool) -> bool:
        starts, ends = self.ends[write]
        at = np.searchsorted(starts, address, side="right") - 1
        return bool(len(starts) and (at >= 0).all() and (address + np.uint64(size) <= ends[at]).all())


class Machine:
    """A batch of blocks of one launch. `grid`, `block`: (x, y, z); `blocks`: the linear numbers of those that run."""

    def __init__(self, kernel: Kernel, grid, block, shared: int, parameters: bytes, regions: Regions, blocks: range):
        self.kernel, self.regions = kernel, regions
        self.threads = int(np.prod(block))
        self.padded = -(-self.threads // 32) * 32
        self.lanes = self.padded * len(blocks)
        thread, which = np.tile(np.arange(self.padded), len(blocks)), np.repeat(np.array(blocks), self.padded)
        self.block_of = np.repeat(np.arange(len(blocks)), self.padded)
        self.warp_of = np.arange(self.lanes) // 32
        self.special = {"%laneid": np.arange(self.lanes) % 32, "%warpid": thread // 32}
        for name, linear, size in (("tid", thread, block), ("ctaid", which, grid)):
            self.special |= {f"%{name}.x": linear % size[0], f"%{name}.y": linear // size[0] % size[1]}
            self.special[f"%{name}.z"] = linear // (size[0] * size[1])
        for name, size in (("ntid", block), ("nctaid", grid)):
            self.special |= {f"%{name}.{axis}": np.full(self.lanes, n) for axis, n in zip("xyz", size, strict=True)}
        self.special = {name: values.astype(np.uint32) for name, values in self.special.items()}
        self.registers = {name: np.zeros(self.lanes, dtype) for name, dtype in kernel.registers.items()}
        self.symbols = {name: offset for name, (offset, _) in kernel.parameters.items()} | kernel.shared
        static = -(-kernel.shared_bytes // 1024) * 1024 if shared else kernel.shared_bytes
        self.symbols |= {kernel.dynamic: static} if kernel.dynamic else {}
        self.shared_bytes, self.stride = static + shared, -(-(static + shared) // 1024) * 1024
        self.shared = np.full(max(self.stride * len(blocks), 8), 0xFF, np.uint8)  # NaN
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint8).copy()
        self.pc = np.zeros(self.lanes, np.int64)
        self.gone, self.blocked = thread >= self.threads, np.zeros(self.lanes, bool)
        self.group = np.zeros(self.lanes, np.int64)  # of asynchronous copies: committed so far
        self.copies: list[tuple[np.ndarray, ...]] = []  # (lanes, groups, shared addresses, data (lanes, bytes))
        self.at = np.arange(0)  # the lanes that run
        code = kernel.code
        self.begins = {*kernel.labels.values()} | {i for i, each in enumerate(code) if each.words[0] in WAITS}

    # --- operands

    def get(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """The value of a register, constant or address in the running lanes, with these bits."""
        if operand in self.registers:
            value = self.registers[operand][self.at]
        elif operand in self.special:
            value = self.special[operand][self.at]
        else:
            value = np.full(len(self.at), self.constant(operand, dtype), dtype)
        if value.dtype == dtype:
            return value
        if value.dtype.itemsize > dtype.itemsize:  # st.u8 of a 16-bit register, %tid as a u16
            return value.view(f"u{value.dtype.itemsize}").astype(f"u{dtype.itemsize}").view(dtype)
        if value.dtype.itemsize < dtype.itemsize:
            raise Fault(f"{operand} is narrower than {dtype}")
        return value.view(dtype)

    def constant(self, text: str, dtype: np.dtype):
        if found := re.match(r"0([fd])([0-9A-Fa-f]+)$", text):
            code = {"f": ">f", "d": ">d"}[found[1]]
            return dtype.type(struct.unpack(code, bytes.fromhex(found[2]))[0])
        if text in self.symbols:
            return dtype.type(self.symbols[text])
        try:
            number = int(text.rstrip("U"), 0)
        except ValueError:
            raise Fault(f"unknown operand {text}") from None
        if dtype.kind == "b":
            return bool(number)
        return np.array([number % 2 ** (8 * dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)[0]

    def put(self, name: str, value: np.ndarray) -> None:
        """Into a register, extended by the sign or zeros of the value's type."""
        register = self.registers[name]
        if value.dtype.itemsize != register.dtype.itemsize:
            if value.dtype.itemsize > register.dtype.itemsize or value.dtype.kind == "f":
                raise Fault(f"a value of {value.dtype} for {name}")
            value = value.astype(f"{value.dtype.kind}{register.dtype.itemsize}")
        register[self.at] = value.view(register.dtype)

    # --- memory

    def address(self, operand: str) -> np.ndarray:
        name, _, offset = operand.strip("[] ").partition("+")
        if name in self.registers:
            size = self.registers[name].dtype.itemsize
            base = self.get(name, np.dtype(f"u{size}")).astype(np.uint64)
        else:
            base = np.full(len(self.at), self.constant(name, np.dtype(np.uint64)), np.uint64)
        return base + np.uint64(int(offset or 0) % 2**64)

    def where(self, space: str, address: np.ndarray, size: int, write: bool, lanes: np.ndarray):
        """(memory, byte index) of checked accesses of `size` bytes each."""
        if (address % np.uint64(size)).any():
            raise Fault(f"a misaligned address of {size} bytes")
        if space == "param":
            if write or (address + np.uint64(size) > len(self.parameters)).any():
                raise Fault("outside of the parameters")
            return self.parameters, address
        tagged = (address & TAG) == SHARED_TAG
        if space == "generic":
            if tagged.all():
                space, address = "shared", address - SHARED_TAG
            elif tagged.any():
                raise Fault("lanes of one generic access in two address spaces: not supported")
            else:
                space = "global"
        elif tagged.any():
            raise Fault(f"a generic address of shared memory given to an access of {space} memory")
        if space.startswith("shared"):
            if (address + np.uint64(size) > self.shared_bytes).any():
                raise Fault(f"outside of the block's {self.shared_bytes} bytes of shared memory")
            return self.shared, address + (self.block_of[lanes] * self.stride).astype(np.uint64)
        if space not in ("global", "const"):
            raise Fault(f"{space} memory is not supported")
        if not self.regions.allow(address, size, write):
            raise Fault(f"{'writes' if write else 'reads'} global memory that it was not given for that")
        return None, address - np.uint64(BASE)

    def cells(self, memory: np.ndarray | None, at: np.ndarray, width: int):
        view = GLOBAL[width] if memory is None else memory.view(f"u{width}")
        return view, (at // np.uint64(width)).astype(np.int64)

    def access(self, one: Instruction) -> None:
        words = one.words
        space = next((w for w in words if w in SPACES), "generic")
        count = next((int(w[1]) for w in words if w in ("v2", "v4")), 1)
        dtype, write = dtype_of(words[-1]), words[0] == "st"
        values, operand = one.operands[::-1] if write else one.operands
        names = values.strip("{} ").replace(" ", "").split(",")
        memory, at = self.where(space, self.address(operand), dtype.itemsize * count, write, self.at)
        view, index = self.cells(memory, at, dtype.itemsize)
        for i, name in enumerate(names):
            if write:
                view[index + i] = self.get(name, np.dtype(f"u{dtype.itemsize}"))
            elif name != "_":
                self.put(name, view[index + i].view(dtype))

    def atomic(self, one: Instruction) -> None:
        """atom and red: lane after lane."""
        words, operands = one.words, list(one.operands)
        target = operands.pop(0) if words[0] == "atom" else None
        dtype = dtype_of(words[-1])
        space = next((w for w in words if w in SPACES), "generic")
        memory, at = self.where(space, self.address(operands[0]), dtype.itemsize, True, self.at)
        view, index = self.cells(memory, at, dtype.itemsize)
        given = [self.get(name, dtype) for name in operands[1:]]
        how = next(w for w in words if w in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
        old = np.empty(len(self.at), dtype)
        for lane, cell in enumerate(index):
            before = view[cell : cell + 1].view(dtype)
            mine = [value[lane : lane + 1] for value in given]
            old[lane] = before[0]
            if how == "exch":
                after = mine[0]
            elif how == "cas":
                after = np.where(before == mine[0], mine[1], before)
            else:
                after = PLAIN[how]([how], before, mine[0])
            view[cell : cell + 1] = after.astype(dtype).view(view.dtype)
        if target:
            self.put(target, old)

    def copy_async(self, one: Instruction) -> None:
        words = one.words
        if words[2] == "commit_group":
            self.group[self.at] += 1
        elif words[2] in ("wait_group", "wait_all"):
            left = int(one.operands[0]) if one.operands else 0
            waits = np.zeros(self.lanes, bool)
            waits[self.at] = True
            kept = []
            for lanes, group, to, data in self.copies:
                done = waits[lanes] & ((group < self.group[lanes] - left) | (words[2] == "wait_all"))
                self.shared[to[done, None] + np.arange(data.shape[1])] = data[done]
                if not done.all():
                    kept.append((lanes[~done], group[~done], to[~done], data[~done]))
            self.copies = kept
        elif words[3:5] == ["shared", "global"]:
            to, source, size, *rest = one.operands
            size = int(size)
            read = self.get(rest[0], np.dtype(np.uint32)) if rest else np.full(len(self.at), size)
            if not np.isin(read, (0, size)).all():
                raise Fault("a copy of a part of its bytes: not supported")
            _, at = self.where("shared", self.address(to), size, True, self.at)
            data, some = np.zeros((len(self.at), size), np.uint8), read == size
            _, address = self.where("global", self.address(source)[some], size, False, self.at[some])
            data[some] = GLOBAL[1][address.astype(np.int64)[:, None] + np.arange(size)]
            self.copies.append((self.at, self.group[self.at], at.astype(np.int64), data))
        else:
            raise Fault("unknown")

    # --- warps

    def shuffle(self, one: Instruction) -> None:
        """shfl.sync.mode.b32 d|p, a, b, c, mask"""
        target, a, b, c, _ = one.operands
        name, _, predicate = target.partition("|")
        u32 = np.dtype(np.uint32)
        value = np.zeros(self.lanes, np.uint32)
        value[self.at] = self.get(a, u32)
        lane, b, c = (self.at % 32).astype(np.int64), self.get(b, u32).astype(np.int64), self.get(c, u32)
        segment, bound = (c >> 8 & 31).astype(np.int64), (c & 31).astype(np.int64)
        low = lane & segment
        high = low | (bound & ~segment)
        mode = one.words[2]
        if mode == "idx":
            source = low | (b & ~segment)
        else:
            source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, lane) + self.at // 32 * 32
        if not np.isin(source, self.at).all():
            raise Fault("a shuffle from a lane that is not there")
        self.put(name, value[source])
        if predicate:
            self.put(predicate, inside)

    def vote(self, one: Instruction) -> None:
        target, predicate, _ = one.operands
        bits = self.mask_of(self.predicate(predicate))[self.warp_of[self.at]]
        here = self.mask_of(np.ones(len(self.at), bool))[self.warp_of[self.at]]
        how = {"ballot": bits, "any": bits != 0, "all": bits == here}
        self.put(target, how[one.words[2]])

    def mask_of(self, flags: np.ndarray) -> np.ndarray:
        """A word for each warp: the running lanes whose flag is set."""
        every = np.zeros(self.lanes, bool)
        every[self.at] = flags
        return (every.reshape(-1, 32) * (1 << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)

    def load_matrix(self, one: Instruction) -> None:
        """Lane i gives the address of row i % 8 of matrix i // 8, and takes of each two elements of row i // 4, or with
        .trans of column i // 4."""
        words = one.words
        if "m8n8" not in words or words[-1] != "b16" or "shared" not in words:
            raise Fault("unknown")
        names = one.operands[0].strip("{} ").replace(" ", "").split(",")
        _, at = self.where("shared", self.address(one.operands[1]), 16, False, self.at)
        rows = at.astype(np.int64).reshape(-1, 32)[:, : 8 * len(names)]
        data = self.shared[rows[..., None] + np.arange(16)].view(np.uint16)  # (warps, rows, 8)
        for i, name in enumerate(names):
            matrix = data[:, 8 * i : 8 * i + 8]
            matrix = matrix.transpose(0, 2, 1) if "trans" in words else matrix
            self.put(name, np.ascontiguousarray(matrix).reshape(-1).view(np.uint32))

    def multiply_matrices(self, one: Instruction) -> None:
        """mma.m16n8k16: fragments as the manual draws them; products and sums exact, rounded once to fp32."""
        words = one.words
        if (
            words[3:6] != ["m16n8k16", "row", "col"]
            or words[6] != "f32"
            or words[7:9] not in (["f16"] * 2, ["bf16"] * 2)
        ):
            raise Fault("unknown")
        d, a, b, c = ([n.strip() for n in each.strip("{} ").split(",")] for each in one.operands)
        g, t = np.arange(32) // 4, 2 * (np.arange(32) % 4)
        warps = len(self.at) // 32

        def pair(name: str) -> np.ndarray:  # (warps, 32, 2)
            bits = self.get(name, np.dtype(np.uint32)).view(np.uint16)
            return (
                convert([], bits, "f32", "bf16").reshape(warps, 32, 2)
                if words[7] == "bf16"
                else bits.view(np.float16).reshape(warps, 32, 2)
            )

        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for i, name in enumerate(a):
            for j in (0, 1):
                left[:, g + 8 * (i % 2), t + 8 * (i // 2) + j] = pair(name)[..., j]
        for i, name in enumerate(b):
            for j in (0, 1):
                right[:, t + 8 * i + j, g] = pair(name)[..., j]
        product = left @ right
        for i, (to, add) in enumerate(zip(d, c, strict=True)):
            mine = product[:, g + 8 * (i // 2), t + i % 2].reshape(-1)
            self.put(to, (mine + self.get(add, np.dtype(np.float32)).astype(np.float64)).astype(np.float32))

    # --- what waits for others

    def ready(self, one: Instruction) -> np.ndarray:
        """Which of the lanes that stand here may go on."""
        name = one.words[0]
        if name in ("bar", "barrier") and one.words[1] != "warp":
            count = self.get(one.operands[1], np.dtype(np.uint32)) if len(one.operands) > 1 else None
            key = self.block_of[self.at] * 16 + self.get(one.operands[0], np.dtype(np.uint32)).astype(np.int64)
            here = np.bincount(key, minlength=self.lanes // self.padded * 16)[key]
            alive = np.bincount(self.block_of[~self.gone], minlength=self.lanes // self.padded)[self.block_of[self.at]]
            return here == (alive if count is None else count)
        here = self.mask_of(np.ones(len(self.at), bool))
        every = (~self.gone).reshape(-1, 32) * (1 << np.arange(32, dtype=np.uint64))
        alive = every.sum(1).astype(np.uint32)[self.warp_of[self.at]]
        mask = alive
        if name in ("shfl", "vote", "bar"):
            mask = self.get(one.operands[-1], np.dtype(np.uint32)) & alive
        elif (alive != 0xFFFFFFFF).any():
            raise Fault("a matrix instruction in a warp that is not whole")
        return (mask & ~here[self.warp_of[self.at]]) == 0

    def predicate(self, name: str) -> np.ndarray:
        flags = self.get(name.lstrip("!"), np.dtype(bool))
        return ~flags if name.startswith("!") else flags

    # --- instructions

    def execute(self, one: Instruction) -> None:
        words, operands = one.words, one.operands
        name = words[0]
        if name in ("ld", "st", "ldu"):
            self.access(one)
        elif name == "mov":
            self.move(one)
        elif name == "setp":
            dtype = dtype_of(words[-1])
            result = compare(words, *(self.get(each, dtype) for each in operands[1:3]))
            if len(operands) > 3:
                result = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[words[2]](
                    result, self.predicate(operands[3])
                )
            target, _, other = operands[0].partition("|")
            self.put(target, result)
            if other:
                raise Fault("setp with two results: not supported")
        elif name == "selp":
            dtype = dtype_of(words[-1])
            a, b = (self.get(each, dtype) for each in operands[1:3])
            self.put(operands[0], np.where(self.predicate(operands[3]), a, b))
        elif name == "cvt":
            to, how = words[-2:]
            if to in ("bf16x2", "f16x2"):
                high, low = (self.get(each, np.dtype(np.float32)) for each in operands[1:])
                high, low = (convert(words, x, to[:-2], "f32").view(np.uint16).astype(np.uint32) for x in (high, low))
                self.put(operands[0], low | (high << np.uint32(16)))
            else:
                given = self.get(operands[1], np.dtype(np.uint16) if how == "bf16" else dtype_of(how))
                self.put(operands[0], convert(words, given, to, how))
        elif name == "cvta":  # to shared or to generic; the addresses of global memory are the same
            address = self.get(operands[1], np.dtype(np.uint64))
            if "shared" in words:
                if "to" in words and ((address & TAG) != SHARED_TAG).any():
                    raise Fault("cvta.to.shared of an address that is not shared memory's")
                address = address - SHARED_TAG if "to" in words else address + SHARED_TAG
            elif "global" not in words:
                raise Fault("unknown")
            self.put(operands[0], address)
        elif name == "cp" and words[1] == "async":
            self.copy_async(one)
        elif name in ("atom", "red"):
            self.atomic(one)
        elif name == "shfl":
            self.shuffle(one)
        elif name == "vote":
            self.vote(one)
        elif name == "ldmatrix":
            self.load_matrix(one)
        elif name == "mma":
            self.multiply_matrices(one)
        elif name in ("bar", "barrier", "membar", "fence", "prefetch"):
            pass  # `ready` did it; all stores are seen at once
        elif words[-1] in ("bf16x2", "f16x2") and name in ("fma", "sub"):
            given = (self.get(each, np.dtype(np.uint32)) for each in operands[1:])
            self.put(operands[0], of_pairs(words, *given))
        elif name in PLAIN:
            self.compute(one)
        else:
            raise Fault("unknown")

    def compute(self, one: Instruction) -> None:
        words, dtype = one.words, dtype_of(one.words[-1])
        counts = {"shl": (1,), "shr": (1,), "shf": (2,), "bfe": (1, 2), "bfi": (2, 3), "lop3": (3,)}.get(words[0], ())
        wide = words[0] == "mad" and words[1] == "wide"
        given = []
        for i, each in enumerate(one.operands[1:]):
            kind = np.dtype(np.uint32) if i in counts else dtype
            given.append(self.get(each, np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if wide and i == 2 else kind))
        result = PLAIN[words[0]](words, *given)
        if result.dtype.itemsize == dtype.itemsize:
            result = result.astype(dtype, copy=False) if result.dtype.kind == dtype.kind else result.view(dtype)
        if "sat" in words:
            result = np.where(np.isnan(result), dtype.type(0), np.clip(result, 0, 1)).astype(dtype)
        self.put(one.operands[0], result)

    def move(self, one: Instruction) -> None:
        to, given = one.operands
        dtype = dtype_of(one.words[-1])
        if given.startswith("{"):
            parts = [p.strip() for p in given.strip("{} ").split(",")]
            size = np.dtype(f"u{dtype.itemsize // len(parts)}")
            self.put(to, np.stack([self.get(p, size) for p in parts], 1).reshape(-1).view(f"u{dtype.itemsize}"))
        elif to.startswith("{"):
            parts = [p.strip() for p in to.strip("{} ").split(",")]
            value = self.get(given, np.dtype(f"u{dtype.itemsize}")).view(f"u{dtype.itemsize // len(parts)}")
            for i, part in enumerate(parts):
                if part != "_":
                    self.put(part, np.ascontiguousarray(value.reshape(-1, len(parts))[:, i]))
        else:
            self.put(to, self.get(given, dtype))

    def run(self) -> None:
        code, labels = self.kernel.code, self.kernel.labels
        while True:
            free = ~(self.gone | self.blocked)
            if not free.any():
                if self.blocked.any():
                    stuck = code[int(self.pc[self.blocked].min())]
                    raise Fault(self.place(stuck, "lanes wait for others that never come"))
                return
            pc = int(self.pc[free].min())
            self.at = np.flatnonzero(~self.gone & (self.pc == pc))
            one = code[pc]
            try:
                if one.words[0] in WAITS:
                    ready = self.ready(one)
                    self.blocked[self.at] = ~ready
                    self.at = self.at[ready]
                if len(self.at):
                    self.block(pc, code, labels)
            except Fault as fault:
                raise Fault(self.place(code[self.now], str(fault))) from None

    def block(self, pc: int, code: list[Instruction], labels: dict[str, int]) -> None:
        """The running lanes, to the end of their basic block."""
        everyone = self.at
        while True:
            self.now, one = pc, code[pc]
            chosen = everyone[self.predicate(one.guard)] if one.guard else everyone
            pc += 1
            if one.words[0] in ENDS:
                self.pc[everyone] = pc
                if one.words[0] == "bra":
                    self.pc[chosen] = labels[one.operands[0]]
                elif one.words[0] == "brx":
                    raise Fault("unknown")
                else:
                    self.gone[chosen] = True
                    self.blocked[:] = False  # who waited for them goes on
                return
            if len(chosen):
                if one.words[0] in WAITS and len(chosen) != len(everyone):
                    raise Fault("a collective under a guard that differs between lanes")
                self.at = chosen
                self.execute(one)
                self.at = everyone
            if pc in self.begins:
                self.pc[everyone] = pc
                return

    def place(self, one: Instruction, what: str) -> str:
        return what if " at " in what else f"{what} at {self.kernel.module}:{one.line} `{one.text}` ({one.source})"


def launch(kernel: Kernel, grid, block, shared: int, parameters: bytes, regions: Regions) -> None:
    """All blocks of a launch, a batch after the other. Raises Fault."""
    blocks = int(np.prod(grid))
    each = max(1, LANES // int(np.prod(block)))
    with np.errstate(all="ignore"):
        for first in range(0, blocks, each):
            some = range(first, min(first + each, blocks))
            Machine(kernel, grid, block, shared, parameters, regions, some).run()
