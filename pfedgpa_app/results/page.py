"""A report's page: a template that needs no other file."""

from __future__ import annotations

from typing import Any

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · pFedGPA</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --page: #ffffff; --soft: #5b6570;
  --line: #d8dde3; --best: #e3f4ea; --second: #f3f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --page: #15181c; --soft: #a2acb8;
  --line: #353c45; --best: #173d2a; --second: #20262d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
th { border-bottom-width: 2px; } td.text { text-align: left; }
.said td { text-align: left; white-space: normal; }
.sortable th { cursor: pointer; } .sortable th::after { content: " \\2195"; color: var(--soft); }
.best { background: var(--best); font-weight: 600; } .second { background: var(--second); }
figure { margin: .6rem 0; } svg { display: block; width: 100%; min-width: 34rem; height: auto; }
pre { white-space: pre-wrap; background: var(--second); padding: .7rem; border-radius: .3rem; }
ul { padding-left: 1.2rem; }
@media print { body { max-width: none; } svg { min-width: 0; }
  h2, figure, tr { break-inside: avoid; }
  .sortable th::after { content: ""; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in about %}<p class="soft">{{ line }}</p>
{% endfor %}
<h2>What clients get</h2>
<div class="wide"><table class="sortable">
<thead><tr>{% for name in table.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if cell.kind %} class="{{ cell.kind }}"{% endif %}>{{ cell.text }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
{% for line in table.legend %}<p class="soft">{{ line }}</p>
{% endfor %}
{% for figure in figures %}<h2>{{ figure.title }}</h2>
<figure><div class="wide">{{ figure.svg | safe }}</div>
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% for part in parts %}<h2>{{ part.title }}</h2>
{% if part.header %}<div class="wide"><table{% if part.said %} class="said"{% endif %}>
<thead><tr>{% for name in part.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if part.lines %}<ul>{% for line in part.lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if part.command %}<pre>{{ part.command }}</pre>{% endif %}
{% if part.note %}<p class="soft">{{ part.note }}</p>{% endif %}
{% endfor %}
<script>
for (const head of document.querySelectorAll(".sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], at = [...head.parentNode.children].indexOf(head);
  const key = row => row.children[at].textContent.trim(), down = head.dataset.down !== "1";
  head.dataset.down = down ? "1" : "";
  [...body.rows].sort((a, b) => {
    const x = parseFloat(key(a)), y = parseFloat(key(b));
    const way = isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
    return down ? -way : way;
  }).forEach(row => body.append(row));
};
</script>
</body>
</html>
"""


def page(**parts: Any) -> str:
    """Return the page, with the texts of its parts escaped.

    Args:
        parts: "title", "about" (lines), "table" (header, rows of cells, legend), "figures" (title,
            svg, caption) and "parts" (title, and any of header with rows, lines, command, note).
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    return environment.from_string(TEMPLATE).render(**parts)
