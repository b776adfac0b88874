"""Ollama's template out of a tokenizer's: equal prompts on conversations that it was not made from, or no template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manyshot.export_chat import ChatTemplate, find_template, modelfile, probes
from manyshot.go_template import GoTemplateError, literal, ollama_prompt, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen 2.5 and SmolLM2: a system message of its own where none is given
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3.1 and 3.2: there is always a system turn, with a date
LLAMA31 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
) + LLAMA3.replace("{% if loop.first %}{{ bos_token }}{% endif %}", "")
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (system if loop.first else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral's v3: the system message stands in the last question; no words of their own ask for an answer
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Phi 3 writes the end token where no answer is asked for
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BRACES = "{% for m in messages %}{{ '{{' + m.role + '{' + m.content + '}}\n' }}{% endfor %}{{ '{{assistant{' }}"


def make_tokenizer(template: str | None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def prompt(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("template", "family", "system"),
    [
        (CHATML, "ChatML", True),
        (DEFAULT_SYSTEM, "ChatML", True),
        (LLAMA3, "Llama 3", True),
        (LLAMA31, "Llama 3", True),
        (GEMMA2, "Gemma", False),
        (GEMMA3, "Gemma", True),
        (MISTRAL, "Mistral", True),
        (LLAMA2, "Mistral", True),
        (PHI3, "Phi or Zephyr", True),
        (BRACES, "its own", True),
    ],
    ids=["chatml", "default system", "llama3", "llama3.1", "gemma2", "gemma3", "mistral", "llama2", "phi3", "braces"],
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_template_gives_the_tokenizers_own_prompts(template: str, family: str, system: bool, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    found = find_template(tokenizer)
    assert found.family == family, found.reason
    assert found.text is not None
    new = [{"role": "user", "content": "One\ntwo."}, {"role": "assistant", "content": "{3}"}] * 3
    talks = [*probes(with_system=system), [*new, {"role": "user", "content": "Four?"}]]
    if system:
        talks.append([{"role": "system", "content": "S1\n\nS2 {{ .Content }}"}, *talks[-1]])
    for messages in talks:
        expected = prompt(tokenizer, messages)
        # what Ollama's tokenizer adds must not stand there a second time
        expected = expected.removeprefix("<s>") if adds_bos else expected
        assert ollama_prompt(found.text, messages) == expected


def test_template_of_chatml_reads_as_people_write_it() -> None:
    assert find_template(make_tokenizer(CHATML)).text == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


def test_template_notes_say_what_is_not_the_models_own() -> None:
    assert any("26 Jul 2024" in note for note in find_template(make_tokenizer(LLAMA31)).notes)
    assert any("refuses system messages" in note for note in find_template(make_tokenizer(GEMMA2)).notes)
    assert any("strips white space" in note for note in find_template(make_tokenizer(LLAMA3)).notes)
    assert find_template(make_tokenizer(CHATML)).notes == ()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        (CHATML.replace("m.content", "m.content | upper"), "does not say every message once"),
        (CHATML.replace("m.content", "m.content | replace('\n', ' ')"), "not put between fixed texts"),
        (CHATML.replace("m.content +", "m.content + (m.content | length | string) +"), "depends on the rest"),
        ("{{ messages | length }}" + CHATML, "depends on the rest of the conversation"),
        ("{{ strftime_now('%Y') }}" + CHATML, "writes today's date"),
        ("{{ raise_exception('never') }}", "refuses a plain conversation"),
        (CHATML + "{% if messages[0].role == 'system' %}!{% endif %}", "a system message changes what follows"),
        (CHATML.replace("<|im_end|>", '"""'), 'holds """'),
    ],
)
def test_template_that_is_more_than_fixed_texts_is_left_out(template: str | None, reason: str) -> None:
    found = find_template(make_tokenizer(template))
    assert found.text is None
    assert reason in (found.reason or "")


def test_templates_of_the_papers_backbones_are_found() -> None:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    for name in ("gemma", "llama3_1", "llama3_2", "qwen3", "qwen2_5"):
        found = find_template(make_tokenizer((folder / f"{name}.jinja").read_text("utf-8")))
        assert found.text is not None, (name, found.reason)


def test_modelfile_holds_template_settings_and_ends() -> None:
    template = find_template(make_tokenizer(CHATML))
    settings = {"temperature": 0.7, "top_p": None, "repetition_penalty": 1.1, "max_length": 99}
    text = modelfile(["FROM ./x.gguf"], template, settings, ["<|im_end|>", 'odd"one'])
    assert text.startswith('FROM ./x.gguf\nTEMPLATE """{{ if .System }}')
    assert text.endswith(
        'assistant\n"""\nPARAMETER temperature 0.7\nPARAMETER repeat_penalty 1.1\nPARAMETER stop "<|im_end|>"\n'
    )
    assert template.stop == "<|im_end|>"
    assert "PARAMETER temperature 0\n" in modelfile([], template, {"do_sample": False, "temperature": 0.7}, [])


def test_modelfile_takes_numbers_alone_from_a_bases_settings() -> None:
    settings = {"temperature": "0\nSYSTEM evil", "top_p": True, "top_k": [1], "min_p": float("nan")}
    assert "PARAMETER" not in modelfile(["FROM ./x.gguf"], ChatTemplate(reason="it is odd"), settings, [])


def test_modelfile_without_a_template_says_why_and_has_none() -> None:
    text = modelfile(["FROM ./x.gguf"], ChatTemplate(reason="it is odd"), {"top_k": 20}, ["</s>"])
    assert [line.split(" ", 1)[0] for line in text.splitlines()] == ["FROM", "#", "PARAMETER", "PARAMETER"]
    assert "it is odd" in text


# ---- the reader of Go templates --------------------------------------------------------------------------------------


def test_go_template_reads_blocks_variables_and_functions() -> None:
    data = {"System": "", "Items": ["a", "b", "c"], "Word": "x"}
    assert render('{{ if .System }}1{{ else if eq .Word "x" }}2{{ else }}3{{ end }}', data) == "2"
    assert render("{{ $n := .Word }}{{ range .Items }}{{ $n }}{{ . }}{{ $n = . }}{{ end }}", {**data}) == "xaabbc"
    last = "{{ range $i, $one := .Items }}{{ if eq (len (slice $.Items $i)) 1 }}last {{ $one }}{{ end }}{{ end }}"
    assert render(last, data) == "last c"
    assert render('{{ if and .Word (eq .Word "y") }}1{{ else }}2{{ end }}', data) == "2"
    assert render("{{ range .System }}1{{ else }}none{{ end }}", data) == "none"


def test_go_template_literals_keep_every_character() -> None:
    for text in ('a{b}{{c}} "quoted" \\ \n\té', "{", "{{", "plain <|end|>\n"):
        assert render(f"{literal(text)}{{{{ .X }}}}{literal(text)}", {"X": "{{x}}"}) == f"{text}{{{{x}}}}{text}"


@pytest.mark.parametrize(
    "text",
    [
        "{{- .X }}",
        "{{ .X | printf }}",
        "{{ .Missing }}",
        "{{ if .X }}1",
        "{{ end }}",
        "{{ $y }}",
        "{{ .X .X }}",
        "{{ (len .X }}",
        "{{ template }}",
        "{{ .X",
    ],
)
def test_go_template_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(GoTemplateError):
        render(text, {"X": "x"})


def test_ollama_joins_neighbours_of_one_role() -> None:
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("user", "b"), ("system", "s"))]
    text = "[{{ .System }}]{{ range .Messages }}({{ .Role }}:{{ .Content }}){{ end }}"
    assert ollama_prompt(text, messages) == "[s](user:a\n\nb)(system:s)"
