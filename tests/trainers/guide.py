"""The code blocks of docs/guides, for the tests that run them."""
import re

import demo


def blocks(name, language):
    """Texts of the fenced blocks of a language, in their order."""
    text = (demo.SOURCE / "docs" / "guides" / f"{name}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
