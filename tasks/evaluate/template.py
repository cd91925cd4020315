"""The page of a report: one file that asks no other host for anything, readable in light and dark and on paper."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1c2128; --soft: #57606a; --line: #d8dee4;
  --faint: #8b949e; --good: #176f3c; --bad: #b3261e; --unsure: #8a5a00; --good-bg: #e2f4e8;
  --bad-bg: #fce8e6; --unsure-bg: #fdf1d8; --torch: #3b6fd4; --packed: #7a4fc9; --litert: #0f8f6f; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1c2128; --ink: #e6eaef; --soft: #a3adb8;
  --line: #333b45; --faint: #77818c; --good: #7ad69a; --bad: #ff9b92; --unsure: #f2c464;
  --good-bg: #16301f; --bad-bg: #3a1c1a; --unsure-bg: #352a12;
  --torch: #7ba6ff; --packed: #b694f5; --litert: #3fc79f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 6px 0; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.mark { display: inline-block; padding: 0 9px; border-radius: 10px; font-size: 13px; font-weight: 600;
  line-height: 21px; white-space: nowrap; }
.passed, .done { color: var(--good); background: var(--good-bg); }
.failed, .missing, .error { color: var(--bad); background: var(--bad-bg); }
.inconclusive, .cancelled { color: var(--unsure); background: var(--unsure-bg); }
.cached, .skipped { color: var(--soft); background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); border-bottom: 1px solid var(--line);
  padding: 6px 10px 6px 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 7px 10px 7px 0; vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; }
td b { font-weight: 650; }
td .under { display: block; color: var(--soft); font-size: 12.5px; }
th.text, td.text { padding-left: 12px; }
td.text { min-width: 190px; overflow-wrap: anywhere; }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.graph svg { max-width: 100%; height: auto; }
.graph text { fill: var(--ink); font: 13px system-ui, "DejaVu Sans", sans-serif; }
.graph rect { fill: var(--card); stroke: var(--line); }
.graph path { fill: none; stroke: var(--faint); stroke-width: 1.3; }
details { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 0 14px; }
summary { cursor: pointer; padding: 9px 0; }
details > div { padding-bottom: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 6px 0; font-size: 13.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul.plain { list-style: none; margin: 0; padding: 0; }
ul.plain li { padding: 4px 0; }
code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); padding: 10px 14px; border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 6px 0; }
table.examples td { min-width: 120px; overflow-wrap: anywhere; white-space: pre-wrap; }
@media print { details { break-inside: avoid; } body { font-size: 12px; } }
"""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.name }}: {{ run.status }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ run.name }} <span class="mark {{ run.status }}">{{ marks[run.status] }} {{ run.status }}</span></h1>
<p class="soft">{{ run.task }} · run <code>{{ run.run_id }}</code> · {{ run.started }} · {{ took }}</p>
</header>

{% if run.verdicts %}
<section>
<h2>Gates</h2>
<div class="scroll">
<table>
<thead><tr><th>verdict</th><th>step</th><th>gate</th><th class="n">measured</th><th class="n">margin</th></tr></thead>
<tbody>
{% for verdict in verdicts %}
<tr>
<td><span class="mark {{ verdict.status }}">{{ marks[verdict.status] }} {{ verdict.status }}</span></td>
<td><b>{{ verdict.step }}</b></td>
<td>{{ verdict.gate }}{% if verdict.why %}<span class="under">{{ verdict.why }}</span>{% endif %}</td>
<td class="n">{{ verdict.value }}
{% if verdict.interval %}<span class="under">{{ verdict.interval }}</span>{% endif %}</td>
<td class="n">{{ verdict.margin }}</td>
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

<section>
<h2>Steps</h2>
<div class="scroll">
<table>
<thead><tr><th>step</th><th class="n">size</th><th class="n">latency p50</th><th class="n">p90 / p99</th>
<th class="n">peak memory</th><th class="n">{{ run.headline }}</th><th class="text">also</th>
<th class="text">what changed</th><th class="n">time</th></tr></thead>
<tbody>
{% for step in steps %}
<tr>
<td><b>{{ step.id }}</b><span class="under">{{ step.uses }}</span></td>
<td class="n">{{ step.size }}{% if step.smaller %}<span class="under">{{ step.smaller }}</span>{% endif %}</td>
<td class="n">{{ step.p50 }}{% if step.faster %}<span class="under">{{ step.faster }}</span>{% endif %}</td>
<td class="n">{{ step.p90 }}{% if step.p99 %}<span class="under">{{ step.p99 }}</span>{% endif %}</td>
<td class="n">{{ step.memory }}</td>
<td class="n">{{ step.quality }}{% if step.interval %}<span class="under">{{ step.interval }}</span>{% endif %}</td>
<td class="text">{{ step.beside }}</td>
<td class="text{{ ' bad' if step.error }}">{{ step.error or step.summary }}</td>
<td class="n"><span class="mark {{ step.state }}">{{ step.state }}</span><span class="under">{{ step.time }}</span></td>
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="soft small">Ratios are against the baseline. Intervals are bootstrap intervals at {{ confidence }}.</p>
{% for how, ids in scenarios %}
<p class="soft small">Latency of {{ ids }}: {{ how }}.</p>
{% endfor %}
</section>

{% if plots %}
<section>
<h2>Plots</h2>
<div class="plots">
{% for title, svg in plots %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>
{% endfor %}
</div>
</section>
{% endif %}

{% if warnings %}
<section>
<h2>Worth knowing</h2>
<ul class="plain">
{% for ids, text in warnings %}
<li><span class="mark inconclusive">!</span> <b>{{ ids }}</b>: {{ text }}</li>
{% endfor %}
</ul>
</section>
{% endif %}

{% if graph %}
<section>
<h2>Graph</h2>
<div class="graph">{{ graph }}</div>
</section>
{% endif %}

<section>
<h2>Step by step</h2>
{% for step in steps %}
<details>
<summary><b>{{ step.id }}</b> <span class="soft">{{ step.uses }}</span></summary>
<div>
<p>{{ step.error or step.summary }}</p>
{% if step.metrics or step.facts %}
<dl>
{% for name, value in step.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
{% for name, value in step.metrics %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
{% if step.examples %}
<p class="soft">{{ step.changed }}.</p>
<div class="scroll">
<table class="examples">
<thead><tr>{% for head in step.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for example in step.examples %}
<tr>{% for head in step.heads %}<td>{{ example[head] }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</div>
</details>
{% endfor %}
</section>

<section>
<h2>Where and how</h2>
<dl>
{% if run.mlflow %}<dt>MLflow</dt><dd>{{ run.mlflow }}</dd>{% endif %}
{% for name, value in run.environment.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% if run.next %}<p class="soft">Next:</p>
<pre>{{ run.next }}</pre>{% endif %}
</section>
</main>
</body>
</html>
"""
