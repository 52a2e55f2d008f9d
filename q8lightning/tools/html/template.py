"""The page around the picture and the tables: HTML, style and script."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --line: #8b949e; --frame: #eceff2 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --line: #6e7781; --frame: #22272d } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
  max-width: 1140px; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { opacity: .7 } dd { margin: 0 }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; pointer-events: none }
.module rect { fill: var(--frame); stroke: var(--line); stroke-width: .7 } .module text { fill: var(--ink) }
.tensor rect { stroke: var(--paper); stroke-width: .8 } .tensor text { fill: #10151b }
.tensor:hover rect { stroke: var(--ink); stroke-width: 2 }
.raw { fill: #c4cbd3; background: #c4cbd3 } .unknown { fill: #d9c8e8; background: #d9c8e8 }
.e0 { fill: #7ccba2; background: #7ccba2 } .e1 { fill: #b7e0a0; background: #b7e0a0 }
.e2 { fill: #e9ee9a; background: #e9ee9a } .e3 { fill: #fbdc8e; background: #fbdc8e }
.e4 { fill: #f7b980; background: #f7b980 } .e5 { fill: #ee7b6c; background: #ee7b6c }
.legend span { display: inline-block; margin-right: 1rem }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; vertical-align: -.1em }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid var(--frame); white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.modules td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 12em }
.modules td:last-child, .modules th:last-child { text-align: left }
#what { min-height: 3.2em; white-space: pre-line }
"""

SCRIPT = """
const what = document.getElementById("what"), hint = what.textContent;
document.querySelectorAll("svg g").forEach(g => {
  g.addEventListener("mouseenter", () => what.textContent = g.querySelector("title").textContent);
  g.addEventListener("mouseleave", () => what.textContent = hint);
});
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - q8lightning</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
<h2>Bytes in the file</h2>
<p>Each box is a tensor, as large as its bytes in the file. Its colour says what the save lost, as a signal-to-noise
ratio in dB: 20 dB is an error of 10%, 40 dB of 1%, 60 dB of 0.1%. Moments may lose far more than weights: what counts
of them is the direction of the update, above.</p>
<p class="legend">{legend}</p>
{treemap}
<p id="what">Point at a box to read what it is.</p>
<h2>By kind</h2>
<div class="scroll"><table>
<tr><th>kind</th><th>tensors</th><th>bytes</th><th>in memory</th><th>smaller</th><th>SQNR dB</th></tr>
{kinds}
</table></div>
<h2>By module</h2>
<div class="scroll"><table class="modules">
<tr><th>module</th><th>tensors</th><th>bytes</th><th>in memory</th><th>smaller</th><th>worst dB</th>
<th>worst tensor</th></tr>
{modules}
</table></div>
<script>{script}</script>
</body>
</html>
"""
