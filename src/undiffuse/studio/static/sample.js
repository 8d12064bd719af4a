// One seed under different solvers, steps, guidance and conditions, side by side, while the samples are drawn.

import { html } from "htm/preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { decode, rangeOf } from "./pixels.js";
import { Command, ConditionFields, Frame, NumberField, Scrubber, SelectField, Status, conditionOf, format, useJob } from "./widgets.js";

const MAX_PANELS = 4;
let numbers = 0;

const panelOf = (solver, steps) => ({ key: numbers++, solver, steps, spacing: "uniform", guidance: 1, label: null, prompt: "" });

function firstPanels(run) {
  const most = (steps) => Math.min(steps, run.longest);
  if (run.calls) return [panelOf("", most(run.calls)), panelOf("", most(2 * run.calls))];
  return [panelOf("ddim", most(10)), panelOf("dpm++2m", most(10))];
}

export function Sample({ run, index, names, active }) {
  const points = run.kind === "points";
  const [seed, setSeed] = useState(0);
  const [n, setN] = useState(points ? 500 : 4);
  const [panels, setPanels] = useState(() => firstPanels(run));
  const [shown, setShown] = useState([]);
  const [place, setPlace] = useState(1);
  const job = useJob();
  const frames = useRef([]);

  function drawSamples() {
    frames.current = panels.map(() => ({ frames: [] }));
    setShown(frames.current);
    setPlace(1);
    const content = panels.map(({ solver, steps, spacing, guidance, ...condition }) => ({
      solver, steps, spacing, guidance, ...conditionOf(run, condition),
    }));
    job.start("sample", { run: index, seed, n, panels: content }, (event) => {
      const drawn = frames.current;
      if (event.kind === "panel") drawn[event.panel] = { frames: [], steps: event.steps, command: event.command };
      else if (event.kind === "frame") {
        const frame = { ...event, x: read(event.x), prediction: read(event.prediction) };
        drawn[event.panel] = { ...drawn[event.panel], frames: [...drawn[event.panel].frames, frame] };
      } else return;
      setShown([...drawn]);
    });
  }
  useEffect(() => {
    if (run.kind !== "other" && !run.error) drawSamples();
  }, []);

  const change = (key, what) => setPanels(panels.map((panel) => (panel.key === key ? { ...panel, ...what } : panel)));
  const add = () => setPanels([...panels, { ...panels.at(-1), key: numbers++ }]);
  const remove = (key) => {
    const at = panels.findIndex((panel) => panel.key === key);
    setPanels(panels.filter((panel) => panel.key !== key));
    frames.current = frames.current.filter((_, i) => i !== at);
    setShown(frames.current);
  };
  const submit = (e) => {
    e.preventDefault();
    drawSamples();
  };
  const solvers = [...(run.calls ? [["", "its own (distilled)"]] : []), ...names.solvers.map((name) => [name, name])];
  const counts = points ? [200, 500, 1000] : [1, 4, 9, 16];
  return html`<form onSubmit=${submit} aria-label="Sample">
    <div class="bar">
      <${NumberField} label="Seed" value=${seed} min="0" max="2147483647" onChange=${setSeed} />
      <${SelectField} label=${points ? "Points" : "Images"} value=${n} options=${counts.map((c) => [c, c])} onChange=${(v) => setN(Number(v))} />
      <button type="submit" class="primary">Draw</button>
      <button type="button" onClick=${add} disabled=${panels.length >= MAX_PANELS || job.busy}>Add a column</button>
      <${Status} job=${job} what="Sampling" />
    </div>
    <${Scrubber} value=${place} onChange=${setPlace} disabled=${!shown.some((panel) => panel.frames?.length)} />
    <div class="panels">
      ${panels.map((panel, i) => html`<${PanelView} key=${panel.key} number=${i + 1} run=${run} names=${names} solvers=${solvers}
        panel=${panel} drawn=${shown[i]} place=${place} many=${panels.length > 1 && !job.busy}
        onChange=${(what) => change(panel.key, what)} onRemove=${() => remove(panel.key)} />`)}
    </div>
  </form>`;
}

const read = (shown) => (shown.points ? shown : decode(shown));

function PanelView({ number, run, names, solvers, panel, drawn, place, many, onChange, onRemove }) {
  const frames = drawn?.frames ?? [];
  const frame = frames[Math.min(frames.length - 1, Math.round(place * (frames.length - 1)))];
  const range = useMemo(() => (frames[0]?.x.points ? rangeOf(frames[0].x.points) : null), [frames[0]]);
  const conditional = run.classes?.length > 0 || run.prompts;
  return html`<section class="card" aria-label=${`Column ${number}`}>
    <div class="fields">
      <${SelectField} label="Solver" value=${panel.solver} options=${solvers} onChange=${(solver) => onChange({ solver })} />
      <${NumberField} label=${panel.solver ? "Steps" : "Calls"} value=${panel.steps} min="1" max=${run.longest} onChange=${(steps) => onChange({ steps })} />
      <${SelectField} label="Spacing" value=${panel.spacing} options=${names.spacings.map((name) => [name, name])} onChange=${(spacing) => onChange({ spacing })} />
      <${ConditionFields} run=${run} value=${panel} onChange=${onChange} />
      ${conditional && html`<${NumberField} label="Guidance" value=${panel.guidance} min="-100" max="100" step="any" onChange=${(guidance) => onChange({ guidance })} />`}
    </div>
    <div class="pair">
      <${Frame} frame=${frame?.x} range=${range} label="x_t" />
      <${Frame} frame=${frame?.prediction} range=${range} label="x̂, the prediction" />
    </div>
    <p class="numbers">${frame ? `step ${frame.step} of ${drawn.steps} · t = ${format(frame.t)} · log-SNR ${frame.log_snr == null ? (frame.t < 0.5 ? "∞" : "−∞") : format(frame.log_snr, 2)}` : " "}</p>
    <${Command} text=${drawn?.command} name=${`sample-${number}`} />
    ${many && html`<button type="button" class="quiet" onClick=${onRemove}>Remove column ${number}</button>`}
  </section>`;
}
