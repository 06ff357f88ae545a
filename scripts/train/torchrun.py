"""torchrun whose own end is quiet: an error of the stage is the one message that the stage prints.

    python scripts/train/torchrun.py --standalone --nproc_per_node 2 train_sft.py …

`torchrun` adds a traceback of itself and of each process, sixty lines about a misspelt path.
"""

import logging
import sys
import tempfile

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # which process ended which, and by what signal
    try:
        with tempfile.TemporaryDirectory() as folder:  # else torchrun leaves an empty one behind
            run(parse_args(["--log_dir", folder, *sys.argv[1:]]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it had no chance to say anything
            print(f"process {rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
