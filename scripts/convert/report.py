"""What a conversion says at its end: what was dropped and why, and what comes next."""

import re
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = 3  # shown of each reason
MAX_KINDS = 50  # a sentence may quote the data, and so be another each time


@dataclass
class Tally:
    """Sentences counted by what they say; names and numbers in them don't matter."""

    kinds: dict[str, list] = field(default_factory=dict)  # [count, first examples]
    count: int = 0

    def add(self, sentence: str, where: str) -> None:
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\b\d+\b", "…", sentence.partition("\n")[0])
        if len(self.kinds) == MAX_KINDS and kind not in self.kinds:
            kind = "for other reasons"
        entry = self.kinds.setdefault(kind, [0, []])
        self.count += 1
        entry[0] += 1
        if len(entry[1]) < EXAMPLES:
            entry[1].append(where if kind == sentence else f"{where}: {sentence[:300]}")

    def __str__(self) -> str:
        lines = []
        for kind, (count, first) in sorted(self.kinds.items(), key=lambda item: -item[1][0]):
            lines += [f"{count:>9,}  {kind}", *(f"             {example}" for example in first)]
        return "\n".join(lines)


@dataclass
class Report:
    output: Path
    root: str | None  # of the media
    notes: Tally
    read: int = 0
    written: int = 0
    dropped: Tally = field(default_factory=Tally)

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.written:,} samples of {self.read:,} records"]
        if self.dropped.count:
            where = self.output.with_suffix(".dropped.jsonl")
            lines += [f"dropped {self.dropped.count:,}, all listed in {where}:", str(self.dropped)]
        if self.notes.count:
            lines += ["noted:", str(self.notes)]
        command = f"python -m scripts.check_data --data_path {self.output}"
        if self.output.suffix != ".parquet":
            command += f" --images_path {self.root or 'FOLDER_OF_THE_MEDIA'}"
        return "\n".join([*lines, f"next: {command}"])
