"""Runs exported bundles as somebody would who has MONAI and nothing of this project: `python alone.py WHAT.json`.

WHAT lists, for each bundle, its folder, what of its config is set otherwise, and where results go.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")


class Absent:
    """Both packages of this project, as where they are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("splitpeer", "splitproto"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from monai.bundle import ConfigWorkflow, verify_net_in_out  # noqa: E402

torch.set_num_threads(1)
for said in json.loads(Path(sys.argv[1]).read_text()):
    workflow = ConfigWorkflow(
        str(Path(said["bundle"]) / "configs" / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=said["bundle"],
        **said.get("set", {}),
    )
    workflow.initialize()
    workflow.run()
    if "input" not in said:
        root = Path(said["bundle"]) / "configs"
        verify_net_in_out(
            "network_def",
            str(root / "metadata.json"),
            str(root / "inference.json"),
            device="cpu",
            bundle_root=said["bundle"],
        )
    else:
        given = safetensors.torch.load_file(said["input"])
        network = workflow.parser.get_parsed_content("network")
        with torch.no_grad():
            made = network(given.get("image", given))
        made = made if isinstance(made, dict) else {"logits": made}
        safetensors.torch.save_file({k: v.contiguous() for k, v in made.items()}, said["output"])
assert not any(name.partition(".")[0] in ("splitpeer", "splitproto") for name in sys.modules)
