"""How others host an export: the exact command of vLLM, a chat template that opens the reasoning, and GGUF.

Used by `temper export`, which prints the command and writes it into the export's README. Ranks and options are those
of vLLM's own source; no test of ours runs vLLM.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tempering.core.policy import Policy, public_base
from tempering.core.run import atomic_write
from tempering.core.sampling import THINK_TOKENS
from tempering.core.think import CLOSE, OPEN, think_text

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes (vllm/config/lora.py)."""
THINK_TEMPLATE = "chat_template_think.jinja"
CONVERTER = "convert_hf_to_gguf.py"
GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
GATED = (
    "vLLM cannot host it: it has LoRA adapters a request, but no gate that mixes experts a token, and opens no "
    "sealed ones; temper serve does"
)
"""Why there is no command for a bundle of safemoe."""


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that an adapter fits into; `None`: none does.

    >>> [vllm_rank(rank) for rank in (1, 4, 8, 48, 300, 513)]
    [1, 8, 8, 64, 320, None]
    """
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def vllm_command(policy: Policy, folder: Path, rank: int | None, thinks: bool) -> str | None:
    """Return the command that serves an export as the model `folder.name`; `None` where the rank is too high.

    `rank`: of an adapter on its public base; `None`: `folder` holds full weights. `thinks`: a chat template that
    opens the reasoning lies beside it.
    """
    parts: list[str] = ["vllm", "serve"]
    if rank is None:
        # Weights are written in float32, which vLLM would turn into float16, where bfloat16 models may overflow.
        parts += [str(folder), "--served-model-name", folder.name, "--dtype", "bfloat16"]
    else:
        allowed = vllm_rank(rank)
        if allowed is None:
            return None
        base, revision = public_base(policy.source)
        parts += [base, *(["--revision", revision] if revision else [])]
        parts += ["--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", f"{folder.name}={folder}"]
    if thinks:
        parts += ["--chat-template", str(folder / THINK_TEMPLATE)]
        if {OPEN, CLOSE} <= set(policy.tokenizer.get_vocab()):  # the parser looks for them as tokens
            parts += ["--reasoning-parser", "deepseek_r1"]
    return shlex.join(parts)


def think_template(tokenizer: Any) -> str | None:
    """Return the tokenizer's chat template with the opening tag behind its generation prompt.

    `None`: the template cannot be written so that it renders what the model was trained on.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    checks = []
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "a"}
    for turns in ([user], [system, user], [user, {"role": "assistant", "content": "b"}, user]):
        with suppress(ValueError):  # a template may refuse some turns, and then renders nothing that could differ
            checks.append((turns, think_text(tokenizer, turns)))
    opened = template + "{% if add_generation_prompt %}{{ '" + OPEN + "\\n' }}{% endif %}"
    for found in (template, opened):  # some open the tag by themselves
        if all(
            tokenizer.apply_chat_template(turns, chat_template=found, tokenize=False, add_generation_prompt=True)
            == wanted
            for turns, wanted in checks
        ):
            return found
    return None


def write_card(policy: Policy, folder: Path, reference: str, rank: int | None) -> str | None:
    """Write README.md: what the export is, how to serve and load it, what a server must add; returns the command."""
    base, revision = public_base(policy.source)
    origin = f"`{base}`" + (f" at revision `{revision}`" if revision else "")
    thinks = THINK_TOKENS in policy.lineage
    template = think_template(policy.tokenizer) if thinks else None
    if template is not None:
        atomic_write(folder / THINK_TEMPLATE, template.encode("utf-8", "surrogatepass"))
    what = f"A LoRA adapter of rank {rank} on {origin}" if rank is not None else f"Full weights, made from {origin}"
    text = f"# {folder.name}\n\n{what}, exported from `{Path(reference).name}`.\n"
    command = vllm_command(policy, folder, rank, template is not None)
    text += "\n## Serve it\n\n"
    if command is None:
        text += (
            f"vLLM takes adapters up to rank {RANKS[-1]}, and this one has {rank}: compress it with `temper export "
            f"... rank={RANKS[-1]}`, or export `format=merged`.\n"
        )
    else:
        text += (
            f"```\n{command}\n```\n\nA client asks for the model `{folder.name}` at `http://localhost:8000/v1`, for "
            f"instance\n\n```\ntemper eval openai:{folder.name}@http://localhost:8000/v1 harm over_refusal\n```\n\n"
            "The command follows vLLM's documentation and was not run when this was written. An edited file or "
            "another place of this folder needs another path in it.\n"
        )
    if thinks:
        text += think_section(policy.tokenizer, has_template=template is not None)
    if rank is not None:
        text += (
            "\n## Load it\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({base!r}"
            + (f", revision={revision!r}" if revision else "")
            + f')\nmodel = PeftModel.from_pretrained(base, "{folder}")\n```\n'
        )
    atomic_write(folder / "README.md", text.encode("utf-8", "surrogatepass"))
    return command


def think_section(tokenizer: Any, *, has_template: bool) -> str:
    """Say what a server must add to the prompts of a model that thinks first."""
    prompt = think_text(tokenizer, [{"role": "user", "content": "REQUEST"}])
    remedy = (
        f"`{THINK_TEMPLATE}` writes it; a server that is not given that file asks"
        if has_template
        else "Whoever serves it must add that, at the end of the template's generation prompt or by sending whole "
        "prompts, else it is asked"
    )
    return (
        f"\n## A model that thinks before it answers\n\nIt was trained on prompts that end with `{OPEN}` and a line "
        f"break, which the chat template of its base does not write. {remedy} in a way that it was not trained on:"
        f"\n\n````\n{prompt}````\n\nIts reply is reasoning, `{CLOSE}`, and the answer. `temper` does this itself for "
        "a model in its own process, and takes the replies of a server apart.\n"
    )


# --- GGUF -----------------------------------------------------------------------------------------------


def find_converter(given: str | None) -> Path:
    """Find llama.cpp's converter: the file given, or one of that name on the PATH.

    Raises:
        FileNotFoundError: the file given is not there.
        ValueError: none is found, with what to do.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"converter={given}: no such file; name llama.cpp's {CONVERTER}")
        return Path(given)
    found = shutil.which(CONVERTER)
    if found is None:
        raise ValueError(
            f"format=gguf needs llama.cpp's {CONVERTER}, a script of its repository that the package gguf does not "
            "hold: git clone https://github.com/ggml-org/llama.cpp, then converter=llama.cpp/" + CONVERTER + "; or "
            "export format=merged here and convert that folder where llama.cpp is"
        )
    return Path(found)


def write_gguf(converter: Path, weights: Path, out: Path, kind: GGUFType) -> None:
    """Convert a folder of full weights to one file.

    Raises:
        RuntimeError: the converter failed, with its last line.
    """
    command = [sys.executable, str(converter), str(weights), "--outfile", str(out), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(
            f"{converter.name} failed with exit code {done.returncode} ({said[-1] if said else 'no message'}); run "
            f"it yourself on an export with format=merged: {shlex.join(command[1:])}"
        )
