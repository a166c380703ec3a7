"""The ranks' checkpoint as the run sees it: the ranks write their shards, the run keeps their folder and hashes."""

import shutil
from pathlib import Path
from typing import Any

from finetune.distributed import sharded, work
from finetune.distributed.launch import Ranks
from finetune.errors import UserError
from finetune.runs import checkpoint

KEPT = 2


class Shards:
    """A state of `Run.steps`: each checkpoint is a folder of one file a rank. `step` is that of the next one."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder, self.step = ranks, folder, 0

    def write(self, name: str) -> Path:
        """Every rank's shard in the folder `name`."""
        folder = self.folder / name
        with checkpoint.writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.hashes = self.ranks.call(work.save, folder)
        return folder

    def state_dict(self) -> dict[str, Any]:
        folder = self.write(f"step_{self.step:06d}")
        for old in sorted(self.folder.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)
        return {"folder": folder.name, "sha256": self.hashes, "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Gives every rank its part. UserError if a file is missing or altered."""
        folder = self.folder / Path(saved["folder"]).name
        for rank, digest in enumerate(saved["sha256"]):
            path = sharded.file_of(folder, rank)
            if not path.is_file() or checkpoint.sha256(path) != digest:
                raise UserError(f"{path} is missing or altered")
        self.ranks.call(work.load, folder)
        self.step = saved["step"]
