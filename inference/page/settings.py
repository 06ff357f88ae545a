"""The page's flags."""

from dataclasses import dataclass
from pathlib import Path

from cli import flag
from inference.server.settings import Shared

MAX_FRAMES = 64  # of a visual: each one is shown


@dataclass
class PageSettings(Shared):
    """Page"""

    load_from: str | None = flag(None, "checkpoint or directory chosen first; none: in --out_dir")
    out_dir: str = flag("out", "folder whose models can be chosen")
    examples: list[str] | None = flag(
        None, "folders of clips to try; none: dataset/eval_videos and the quickstart's test clips"
    )

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"--examples {folder}: no such folder"
            for folder in self.examples or ()
            if not Path(folder).is_dir()
        ]
        if self.num_frames and self.num_frames > MAX_FRAMES:
            found.append(f"--num_frames is {self.num_frames}: the page shows up to {MAX_FRAMES}")
        return found

    def example_folders(self) -> list[Path]:
        if self.examples:
            return [Path(folder) for folder in self.examples]
        return [Path("dataset/eval_videos"), Path(self.out_dir, "quickstart/data/test/clips")]
