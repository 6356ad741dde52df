"""The look of a report: one style sheet, light and dark after the reader's system."""

CSS = """
:root { color-scheme: light dark; --back: #f8fafc; --card: #fff; --ink: #0f172a; --dim: #64748b; --line: #e2e8f0;
  --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0b1120; --card: #131c31; --ink: #e2e8f0; --dim: #94a3b8; --line: #24304a; --accent: #60a5fa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.05rem; margin: 0 0 0.8rem; }
.url { margin: 0.1rem 0 1.2rem; color: var(--dim); font: 0.85rem ui-monospace, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.badge { font-size: 0.75rem; font-weight: 600; padding: 0.15rem 0.6rem; border-radius: 1rem; vertical-align: middle;
  color: #fff; background: #b45309; letter-spacing: 0.02em; }
.badge.good { background: #15803d; } .badge.bad { background: #b91c1c; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: 0.7rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.7rem 0.9rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: 0.78rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 1.2rem 0 0; font-size: 0.88rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 1.1rem 1.3rem;
  margin-top: 1.1rem; }
figure { margin: 0 0 0.9rem; }
figure svg, figure img { display: block; width: 100%; height: auto; max-width: 56rem; }
figcaption { color: var(--dim); font-size: 0.82rem; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 0.6rem 1.2rem; }
.multiples figcaption { font: 0.78rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 3.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; min-width: 24rem; }
th { text-align: left; color: var(--dim); font-weight: 600; }
th, td { padding: 0.28rem 1.6rem 0.28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
table.figures td:last-child { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
pre { font: 0.8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-x: auto; margin: 0.5rem 0 0; }
summary { cursor: pointer; color: var(--dim); font-size: 0.85rem; }
footer { color: var(--dim); font-size: 0.8rem; margin-top: 1.5rem; }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
