"""DeepSpec's eval.py with our evaluators in its table: run as a module with the checkout on the path.

Takes eval.py's own options and ``--tasks name:prompts,…``; one worker per visible GPU, as eval.py spawns them.
"""

import argparse
import importlib
import sys
from typing import Any


def evaluators() -> dict[str, Any]:
    """Our evaluator for each architecture that a draft of ours can have."""
    from nemotron_dspark.deepspec.evaluators import NemotronDSparkEvaluator, NemotronEagle3Evaluator

    return {"Qwen3DSparkModel": NemotronDSparkEvaluator, "Qwen3Eagle3Model": NemotronEagle3Evaluator}


def parse() -> argparse.Namespace:
    """eval.py's arguments, with its tasks replaced where ``--tasks`` is given."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--tasks")
    given, rest = own.parse_known_args()
    sys.argv[1:] = rest
    args = importlib.import_module("eval").parse_args()
    if given.tasks:
        pairs = (part.partition(":") for part in given.tasks.split(","))
        args.tasks = [(name, int(count) if count else None) for name, _, count in pairs]
    return args


def worker(local_rank: int, args: argparse.Namespace) -> None:
    entry = importlib.import_module("eval")
    entry.EVALUATORS.update(evaluators())
    entry.main(local_rank, args)


if __name__ == "__main__":
    import torch

    torch.multiprocessing.spawn(worker, args=(parse(),), nprocs=torch.cuda.device_count())
