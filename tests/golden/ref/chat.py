"""Chat templates as transformers renders them, from the jinja in tests/golden/templates."""

import json
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
DATE = "26 Jul 2024"  # the templates' own default


def specials(folder: Path) -> dict[str, str]:
    """bos_token and eos_token as the tokenizer's configuration has them."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    out = {}
    for key in ("bos_token", "eos_token"):
        value = config.get(key) or ""
        out[key] = value["content"] if isinstance(value, dict) else value
    return out


def jinja_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def render(jinja: str, messages: list[dict], tokens: dict[str, str]) -> tuple[str, str]:
    """(prompt, completion) whose join is apply_chat_template of the whole conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def text(some: list[dict], opened: bool) -> str:
        rendered, _ = render_jinja_template(conversations=[some], chat_template=jinja, add_generation_prompt=opened, date_string=DATE, **tokens)
        return rendered[0]

    prompt, whole = text(messages[:-1], True), text(messages, False)
    assert whole.startswith(prompt), f"the opened prompt is no prefix of the conversation: {prompt!r} {whole!r}"
    return prompt, whole[len(prompt):]
