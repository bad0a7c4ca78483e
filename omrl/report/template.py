"""The page's template: in a module, so that the report's fingerprint covers it."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OMRL: {{ facts.env }}</title>
<style>
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --tint: #f5f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 0 0 6px; }
.lead { font-size: 17px; max-width: 60em; } .soft { color: var(--soft); } .facts { color: var(--soft); margin: 0 0 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: 5px 7px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th.t, td.t { text-align: left; } td.strong { font-weight: 650; }
tr.reference td { color: var(--soft); font-style: italic; background: var(--tint); }
figure { margin: 0 0 26px; } figure img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; padding: 6px; }
figcaption { color: var(--soft); font-size: 14px; max-width: 58em; }
code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--tint); border-radius: 3px; }
code { padding: 1px 4px; } pre { padding: 10px 14px; overflow-x: auto; }
.up { color: #00714f; } .down { color: #b14a00; }
</style>
</head>
<body><main>
<h1>{{ facts.env }}</h1>
<p class="facts">{{ facts.train_tasks }} training tasks, {{ facts.test_tasks }} unseen test tasks &middot; {{ facts.transitions }} transitions per task &middot; {{ facts.seeds }} seed{{ "s" if facts.seeds != 1 }} &middot; protocol <code>{{ facts.protocol }}</code></p>
<p class="lead">{{ lead }}</p>

<h2>Results</h2>
<div class="scroll"><table>
<tr><th class="t">algorithm</th><th class="t">trained on</th><th class="t">test context</th><th>return</th><th>{{ confidence }} interval</th><th>IQM</th><th>normalized</th><th>training tasks</th><th>drop</th>{% if behind %}<th>behind the best</th>{% endif %}{% if restated %}<th>as {{ facts.other_form }}</th>{% endif %}<th>ESR</th><th>RMS</th>{% if published %}{% if published.quantity == "return" %}<th>published</th><th>ours &minus; published</th>{% else %}<th>{{ published.quantity }}, published</th>{% endif %}{% endif %}</tr>
{% for row in rows %}
<tr><td class="t">{{ row.cell[0] }}</td><td class="t">{{ row.cell[1] }}</td><td class="t">{{ row.cell[2] }}</td><td class="strong">{{ "%.2f"|format(row.summary.mean) }}</td><td>{{ "%.2f"|format(row.summary.low) }} to {{ "%.2f"|format(row.summary.high) }}</td><td>{{ "%.2f"|format(row.summary.iqm) }}</td><td>{% if row.normalized is not none %}{{ signed(row.normalized) }}{% endif %}</td><td>{{ "%.2f"|format(row.train_tasks) }}</td><td>{% if drops[loop.index0] is not none %}{{ "%.2f"|format(drops[loop.index0]) }}{% endif %}</td>{% if behind %}<td>{{ behind[loop.index0] }}</td>{% endif %}{% if restated %}<td>{% if row.restated is not none %}{{ "%.2f"|format(row.restated) }}{% endif %}</td>{% endif %}<td>{% if row.diagnostics.esr is defined %}{{ "%.2f"|format(row.diagnostics.esr) }}{% endif %}</td><td>{% if row.diagnostics.rms is defined %}{{ "%.2f"|format(row.diagnostics.rms) }}{% endif %}</td>{% if published and published.quantity != "return" %}<td>{% if row.published is not none %}{{ "%.3f"|format(row.published) }}{% endif %}</td>{% elif published %}{% if row.published is not none %}<td>{{ "%.2f"|format(row.published) }}</td><td class="{{ "up" if row.summary.mean >= row.published else "down" }}">{{ "%+.2f"|format(row.summary.mean - row.published) }}</td>{% else %}<td></td><td></td>{% endif %}{% endif %}</tr>
{% endfor %}
{% for name, value in references.items() %}
<tr class="reference"><td class="t">{{ name }}</td><td></td><td></td><td>{{ "%.2f"|format(value) }}</td><td></td><td></td><td></td><td></td><td></td><td></td><td></td>{% if behind %}<td></td>{% endif %}{% if restated %}<td></td>{% endif %}{% if published %}<td></td>{% if published.quantity == "return" %}<td></td>{% endif %}{% endif %}</tr>
{% endfor %}
{% for name, value in behavior.items() %}
<tr class="reference"><td class="t">behavior policies</td><td class="t">{{ name }}</td><td></td><td>{{ "%.2f"|format(value) }}</td><td></td><td></td><td></td><td></td><td></td><td></td><td></td>{% if behind %}<td></td>{% endif %}{% if restated %}<td></td>{% endif %}{% if published %}<td></td>{% if published.quantity == "return" %}<td></td>{% endif %}{% endif %}</tr>
{% endfor %}
</table></div>
<p class="soft">{{ facts.returns|capitalize }} return over {{ facts.horizon }} steps, mean over seeds, tasks and repetitions. Interval: bootstrap of the mean over tasks and whole seeds; two rows whose intervals overlap are not told apart by these data.{% if behind %} Behind the best: difference to the best algorithm on the same datasets, bootstrap paired over tasks; ~ marks differences that these data do not support.{% endif %} Normalized: 0 is random, 1 the oracle. Drop: return with matching test context minus this one. ESR and RMS: separation of the training tasks' embeddings (FOCAL, Table 1). Behavior policies: the episodes in the data, sampled actions, all tasks.{% if published %} Published: {{ published.citation }}. {{ published.note }}{% endif %}</p>

{% for picture in pictures %}
{% if loop.first %}<h2>Pictures</h2>{% endif %}
<figure><h3>{{ picture.title }}</h3><img src="{{ picture.uri }}" alt="{{ picture.title }}"><figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}

{% if remark %}<p class="soft">{{ remark }}</p>{% endif %}

<h2>Datasets</h2>
<div class="scroll"><table>
<tr><th class="t">dataset</th><th class="t">definition</th><th>transitions</th><th>episodes</th><th>behavior return</th><th>with sparse reward</th><th>dense reward, mean</th></tr>
{% for name, card in cards.items() %}
<tr><td class="t">{{ name }}</td><td class="t">{{ definitions[name] }}</td><td>{{ "{:,}".format(card.rows) }}</td><td>{{ "{:,}".format(card.episodes) if card.episodes else "" }}</td><td>{% if name in behavior %}{{ "%.2f"|format(behavior[name]) }}{% endif %}</td><td>{{ "%.1f"|format(100 * card.nonsparse_share) }} %</td><td>{{ "%.3f"|format(card.reward.mean) }}</td></tr>
{% endfor %}
</table></div>

<h2>Lineage</h2>
<p>Every number above goes back to transitions, checkpoints, SAC runs, parameters and code. <code>reports/lineage.json</code> has the chain of SHA-256 hashes; these commands walk it and compare it with what lies on disk:</p>
<pre>omrl lineage {{ rows[0].cell|join("/") }}              # a number of this table
omrl lineage data/datasets/{{ rows[0].cell[2] }}/task=000.parquet:0   # one transition
omrl verify                                     # every file and cache object against dvc.lock</pre>
<div class="scroll"><table>
<tr><th class="t">model</th><th class="t">test context</th><th>seed</th><th>return</th><th class="t">evaluation</th><th class="t">model</th><th class="t">training data</th></tr>
{% for entry in chain %}
<tr><td class="t">{{ entry.algorithm }} / {{ entry.train }}</td><td class="t">{{ entry.test }}</td><td>{{ entry.seed }}</td><td>{{ "%.2f"|format(entry.mean) }}</td><td class="t"><code>{{ entry.evaluation[:12] }}</code></td><td class="t"><code>{{ entry.model[:12] }}</code></td><td class="t"><code>{{ entry.data[:12] }}</code></td></tr>
{% endfor %}
</table></div>
<p class="soft">Hashes are the first digits of the SHA-256 of each folder's manifest.</p>

<h2>Rebuild</h2>
<p><code>dvc repro</code> in this pipeline's folder rebuilds everything from nothing; <code>params.yaml</code> beside <code>dvc.yaml</code> holds every knob. Made with OMRL {{ facts.version }}.</p>
</main></body></html>
"""
