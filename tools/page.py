"""Blocks and tables of the pages in docs/."""

import re


def fill(text, blocks):
    """A page's text, with `blocks` in place of what is between `<!-- name -->` and `<!-- end -->`.
    """
    for name, block in blocks.items():
        text = re.sub(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)",
                      lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def markdown(lines):
    heads, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([heads, "|---" * len(lines[0]) + "|", *rest])
