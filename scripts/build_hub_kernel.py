# SPDX-License-Identifier: Apache-2.0
"""
Writes the CE + KL head as a kernel for the Hub, for those who want `linear_ce_kl` without TRL and transformers.

    python scripts/build_hub_kernel.py --repo_id your-name/linear-ce-kl --output_dir outputs/hub_kernel

The folder holds `build.toml` and `torch-ext/`, which `kernel-builder build-and-upload` takes, and the same built for
CPUs and CUDA, so that it can be tried before: `kernels.get_local_kernel(Path("outputs/hub_kernel"))`.
"""

import argparse
import json
import shutil
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

import trl_selfdistill.losses
from trl_selfdistill.files import read_json, write_json, written_whole


NAME, VERSION, LICENSE, BACKENDS = "linear-ce-kl", 1, "Apache-2.0", ("cpu", "cuda")
BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = {backends}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""
CARD = """---
license: apache-2.0
tags:
- kernel
---
# Cross-entropy plus KL to a teacher, from hidden states

`linear_ce_kl` of [trl_selfdistill](https://github.com/your-name/trl-selfdistill) {version}: four matrix products and
one pass over each chunk of logits, which are never in memory all at once.

```python
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version=1, trust_remote_code=["{repo_id}"])
head, teacher_head = kernel.LMHead(model.lm_head.weight), kernel.LMHead(teacher.lm_head.weight)
loss = kernel.linear_ce_kl(hidden, head, teacher_hidden, teacher_head, shift_labels, kl_weight=0.3).loss
```
"""


def kernel_id(backend: str) -> str:
    return f"trl_selfdistill_{NAME.replace('-', '_')}_{backend}_{VERSION}"


def write_kernel(folder: Path, repo_id: str) -> None:
    """Writes the sources and what is built from them, which for Python is a copy for each backend."""
    losses = Path(trl_selfdistill.losses.__file__).parent
    build = BUILD.format(name=NAME, version=VERSION, license=LICENSE, backends=json.dumps(BACKENDS), repo_id=repo_id)
    (folder / "build.toml").write_text(build, encoding="utf-8")
    card = CARD.format(version=trl_selfdistill.__version__, repo_id=repo_id)
    (folder / "README.md").write_text(card, encoding="utf-8")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(losses, folder / "torch-ext" / NAME.replace("-", "_"), ignore=ignored)
    for backend in BACKENDS:
        built = folder / "build" / f"torch-{backend}"
        shutil.copytree(losses, built, ignore=ignored)
        about = {"name": NAME, "id": kernel_id(backend), "version": VERSION}
        about |= {"license": LICENSE, "python-depends": [], "backend": {"type": backend}}
        write_json(built / "metadata.json", about)


def main() -> None:
    """Writes the folder, in place of one that it wrote before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", default=f"your-name/{NAME}", help="where it will be published")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/hub_kernel"))
    args = parser.parse_args()
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        parser.error(f"--repo_id: {error}")
    if "/" not in args.repo_id:
        parser.error(f"--repo_id must name its owner, as your-name/{NAME}, got {args.repo_id}.")
    output = args.output_dir.resolve()
    # Only what it wrote itself gives way
    own = output / "build" / f"torch-{BACKENDS[0]}" / "metadata.json"
    if output.exists() and not (own.is_file() and read_json(own).get("id") == kernel_id(BACKENDS[0])):
        parser.error(f"--output_dir {args.output_dir} exists, and is no kernel of this script. Name another folder.")
    if output.is_relative_to(Path(trl_selfdistill.__file__).parent):
        parser.error(f"--output_dir {args.output_dir} is inside of the package. Name another folder.")
    with written_whole(output) as folder:
        folder.mkdir()
        write_kernel(folder, args.repo_id)
    print(f"Kernel: {args.output_dir}   publish it with: kernel-builder build-and-upload {args.output_dir}")


if __name__ == "__main__":
    main()
