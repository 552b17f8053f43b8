"""Train a language model: deepspeed megalm/train.py --config FILE [--set key=value ...]

Pretraining and fine-tuning alike, on one CPU or a thousand GPUs: the config says what, the launcher says where.
Exit codes: 0 done, at the last step or by evaluate.patience; 2 a mistake in the config or the files; 3 stopped by the
anomaly policy; 75 stopped by a signal after saving, to be started again.
"""

import sys
from pathlib import Path

# Python puts this script's folder first on the path, where config, data, ... would shadow other people's modules.
_FOLDER = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _FOLDER]
if str(_FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(_FOLDER.parent))

import argparse  # noqa: E402
import os  # noqa: E402

from megalm.config import dump, load  # noqa: E402
from megalm.errors import MegalmError, main_guard  # noqa: E402
from megalm.training.config import RunConfig  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML; docs/config.md lists every key")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeatable")
    parser.add_argument("--resume", metavar="WHAT", help="auto (default), never, or a checkpoint: checkpoint.resume")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it
    return parser.parse_args()


def main() -> int:
    given = arguments()
    overrides = [*given.set, *([f"checkpoint.resume={given.resume}"] if given.resume else [])]
    config = load(given.config, RunConfig, overrides)
    if given.print_config:
        print(dump(config), end="")
        return 0
    from megalm.training.plan import plan

    try:
        planned = plan(config, int(os.environ.get("WORLD_SIZE", "1")))
    except MegalmError as error:
        error.echo = os.environ.get("LOCAL_RANK", "0") != "0"  # the first rank of this machine finds the same
        raise
    from megalm.training.whereabouts import Whereabouts

    whereabouts = Whereabouts.of_environment()
    whereabouts.note("importing libraries")
    # From here on imports take seconds, and the device decides what they find.
    from megalm.parallel import device

    kind = device.choose(config.run.device)
    from megalm.parallel import groups
    from megalm.training.build import build
    from megalm.training.loop import train

    code = train(build(planned, kind, whereabouts))
    groups.destroy()
    return code


if __name__ == "__main__":
    main_guard(main)
