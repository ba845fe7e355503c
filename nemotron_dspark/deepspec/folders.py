"""Where a DeepSpec run keeps its checkpoints and TensorBoard events when its config does not say."""

from pathlib import Path
from typing import Any


def finalize_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """DeepSpec calls this on a config after `--opts`: folders left at None become DeepSpec's usual ones.

    ``~/checkpoints/<project_name>/<exp_name>`` and ``~/tensorboard/<project_name>/<exp_name>``.
    """
    logging = dict(cfg["logging"])
    for key, root in (("checkpoint_dir", "checkpoints"), ("tensorboard_dir", "tensorboard")):
        folder = logging.get(key) or Path.home() / root / str(cfg["project_name"]) / str(cfg["exp_name"])
        logging[key] = str(Path(folder).expanduser().absolute())
    return {**cfg, "logging": logging}
