"""
Reading safetensors files. Ours, because it is several times as fast as the library's: it reads instead of mapping, on a
few threads, straight into the memory in which a tensor stays, and looks at every number on the way.

Nothing here knows a model: a file is what its header says it is, once that has been checked.
"""

import json
import math
import os
import stat
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError, safe_open

from plumbing.errors import UserError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"I8": torch.int8}
MAX_HEADER = 2**21  # bytes of a safetensors header; GPT-2 XL's has 60 thousand
PIECE = 2**20       # numbers that are read at once
READERS = 4         # threads that read: one alone cannot use the bandwidth of the memory

Stored = namedtuple("Stored", "path name dtype shape start")


def read_header(path):
    """What a safetensors file says it holds, {name: Stored}, without its tensors. Raises UserError if it cannot be."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a regular file; it must be a safetensors file")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise UserError(f"{path} is no safetensors file: its header would have {size} bytes, more than "
                                f"{MAX_HEADER}; if it is a pickle, convert it with transformers' save_pretrained")
            with safe_open(path, "pt"):  # checks lengths, offsets, overlaps and duplicates
                header = json.loads(file.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or no safetensors file ({' '.join(str(error).split())[:120]}); "
                        f"fetch it again") from None
    header.pop("__metadata__", None)
    return {name: Stored(path, name, x["dtype"], tuple(x["shape"]), 8 + size + x["data_offsets"][0])
            for name, x in header.items()}


def side_by_side(read, entries):
    """The results of read(entry), on a few threads: they wait for memory, and share nothing out to further ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(read, entries))
    finally:
        torch.set_num_threads(threads)


def read_tensor(parts, dtype, device):
    """
    The tensors of a list, stacked, in memory of their own. Read, not mapped: training may write them, and the file may
    be replaced. Each piece is looked at while it is still in the processor's cache, where that costs next to nothing,
    and nothing larger than a piece is ever held twice. Raises UserError on a number that is not finite in this dtype.
    """
    x = left = torch.empty(sum(math.prod(part.shape) for part in parts), dtype=dtype, device=device)
    for part in parts:
        stored = DTYPES[part.dtype]
        direct = stored == dtype and x.device.type == "cpu"
        buffer = None if direct else torch.empty(PIECE, dtype=stored, pin_memory=x.is_cuda)
        with open(part.path, "rb") as file:
            file.seek(part.start)
            for piece in left[: math.prod(part.shape)].split(PIECE):
                raw = piece if direct else buffer[: len(piece)]
                if file.readinto(raw.view(torch.uint8).numpy()) != raw.nbytes:
                    raise UserError(f"{part.path} became shorter while it was read; fetch it again")
                raw = raw.to(dtype)
                if not all(end.isfinite() for end in raw.aminmax()):
                    raise UserError(f"{part.path}: {part.name} is not finite as {dtype}; the file is damaged, or its "
                                    f"numbers need a wider type")
                if not direct:
                    piece.copy_(raw)
        left = left[math.prod(part.shape):]
    return x.view(-1, *parts[0].shape[1:]) if parts[0].shape else x[0]
