"""What to do with an export: the commands of the tools that come next, with this export's own paths filled in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what vLLM takes as --max-lora-rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
QUANTIZATION = "Q4_K_M"


@dataclass(frozen=True)
class Hint:
    """A tool, the lines to type (or, for Python, to run), and what to know of them."""

    tool: str
    lines: tuple[str, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"tool": self.tool, "lines": list(self.lines), "note": self.note}


def export_name(output: Path) -> str:
    """What other tools call the export: the folder's name, in letters that all of them take."""
    return re.sub(r"[^a-z0-9._-]+", "-", output.resolve().name.lower()).strip("-.") or "merged"


def model_hints(output: Path, dtype: str, *, chat: bool) -> list[Hint]:
    """For a model folder."""
    folder, name = shlex.quote(str(output)), export_name(output)
    gguf, small = output / f"{name}.gguf", output / f"{name}-{QUANTIZATION}.gguf"
    return [
        Hint("vLLM", (f"vllm serve {folder} --served-model-name {name}",)),
        Hint("transformers", _python(output, None, chat=chat)),
        _lm_eval(output, None, chat=chat),
        Hint("manyshot", (f"manyshot eval {folder} --tasks arc_easy{' --chat-template' if chat else ''}",)),
        Hint("llama.cpp", (_convert(output, gguf, dtype), _quantize(gguf, small))),
        Hint("Ollama", _ollama(output), f"after llama.cpp's two commands: the Modelfile reads {small.name}"),
    ]


def adapter_hints(output: Path, base: Path, base_dtype: str, rank: int, *, chat: bool) -> list[Hint]:
    """For an adapter on the model folder `base`."""
    name, adapter = export_name(output), shlex.quote(str(output))
    allowed = next((one for one in VLLM_RANKS if one >= rank), None)
    serve = (
        f"vllm serve {shlex.quote(str(base))} --enable-lora --max-lora-rank {allowed} "
        f"--lora-modules {shlex.quote(f'{name}={output}')}"
    )
    vllm = (
        Hint("vLLM", (serve,)) if allowed else Hint("vLLM", (), f"rank {rank} is above its largest, {VLLM_RANKS[-1]}")
    )
    template = " --chat-template" if chat else ""
    gguf, lora = output / "base.gguf", output / f"{name}-lora.gguf"
    convert = (
        f"python convert_lora_to_gguf.py {adapter} --base {shlex.quote(str(base))} --outfile {shlex.quote(str(lora))}"
    )
    return [
        vllm,
        Hint("transformers and PEFT", _python(base, output, chat=chat)),
        _lm_eval(base, output, chat=chat),
        Hint("manyshot", (f"manyshot eval {adapter} --base {shlex.quote(str(base))} --tasks arc_easy{template}",)),
        Hint(
            "llama.cpp",
            (
                _convert(base, gguf, base_dtype),
                convert,
                f"llama-cli -m {shlex.quote(str(gguf))} --lora {shlex.quote(str(lora))}",
            ),
        ),
        Hint("Ollama", _ollama(output), "after llama.cpp's first two commands: the Modelfile reads what they write"),
    ]


def mergekit_hints(output: Path, file: str, *, adapters: bool) -> list[Hint]:
    """For a mergekit file; its paths are relative to its folder."""
    cache = " --lora-merge-cache lora-cache --lora-merge-dtype float32" if adapters else ""
    command = f"cd {shlex.quote(str(output))} && mergekit-yaml {file} merged-by-mergekit{cache}"
    return [Hint("mergekit", (command,))]


def from_lines(output: Path, *, adapter: bool) -> Sequence[str]:
    """Where a Modelfile finds the weights that llama.cpp's commands write beside it."""
    name = export_name(output)
    if adapter:
        return ["FROM ./base.gguf", f"ADAPTER ./{name}-lora.gguf"]
    return [f"FROM ./{name}-{QUANTIZATION}.gguf", f"# unquantised: FROM ./{name}.gguf"]


def _python(model: Path, adapter: Path | None, *, chat: bool) -> tuple[str, ...]:
    """A reply by plain transformers."""
    peft = ("from peft import PeftModel",) if adapter else ()
    on_top = (f"model = PeftModel.from_pretrained(model, {_string(adapter)})",) if adapter else ()
    prompt = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)'
        if chat
        else 'inputs = tokenizer("Hello", return_tensors="pt")'
    )
    return (
        *peft,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({_string(model)})",
        f'model = AutoModelForCausalLM.from_pretrained({_string(model)}, dtype="auto")',
        *on_top,
        prompt,
        'reply = model.generate(**inputs.to(model.device), max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(reply, skip_special_tokens=True))",
    )


def _string(path: Path) -> str:
    """A path in Python, whatever signs it has."""
    return json.dumps(str(path), ensure_ascii=False)


def _lm_eval(model: Path, adapter: Path | None, *, chat: bool) -> Hint:
    peft = f",peft={adapter}" if adapter else ""
    arguments = f"pretrained={model}{peft},dtype=auto"
    if "," in f"{model}{adapter or ''}":
        return Hint("lm-evaluation-harness", (), "its --model_args take no path with a comma")
    template = " --apply_chat_template" if chat else ""
    command = f"lm_eval --model hf --model_args {shlex.quote(arguments)} --tasks arc_easy --batch_size 8{template}"
    return Hint("lm-evaluation-harness", (command,))


def _convert(model: Path, gguf: Path, dtype: str) -> str:
    outtype = OUTTYPES.get(dtype, "f32")
    folder, file = shlex.quote(str(model)), shlex.quote(str(gguf))
    return f"python convert_hf_to_gguf.py {folder} --outtype {outtype} --outfile {file}"


def _quantize(gguf: Path, small: Path) -> str:
    return f"llama-quantize {shlex.quote(str(gguf))} {shlex.quote(str(small))} {QUANTIZATION}"


def _ollama(output: Path) -> tuple[str, ...]:
    name = export_name(output)
    return (f"ollama create {name} -f {shlex.quote(str(output / 'Modelfile'))}", f"ollama run {name}")
