// Views of one or two images: the forward process and back, the likelihood, interpolation.

import { html } from "htm/preact";
import { useMemo, useRef, useState } from "preact/hooks";
import { Chart } from "./chart.js";
import { decode } from "./pixels.js";
import { Command, ConditionFields, Frame, ImageSource, NumberField, Scrubber, Status, conditionOf, format, useJob } from "./widgets.js";

export function Forward({ run, index, active }) {
  const [picture, setPicture] = useState(null);
  const [seed, setSeed] = useState(0);
  const [cond, setCond] = useState({});
  const [frames, setFrames] = useState([]);
  const [place, setPlace] = useState(0);
  const [result, setResult] = useState({});
  const [strength, setStrength] = useState(0.6);
  const job = useJob();
  const back = useJob();
  const drawn = useRef([]);

  function addNoise(source = picture?.source) {
    if (!source) return;
    drawn.current = [];
    setFrames([]);
    setPlace(0);
    job.start("forward", { run: index, seed, source, ...conditionOf(run, cond) }, (event) => {
      if (event.kind === "frame") {
        drawn.current = [...drawn.current, { ...event, x: decode(event.x), prediction: decode(event.prediction) }];
        setFrames(drawn.current);
      } else if (event.kind === "done") setResult((old) => ({ ...old, forward: event.command }));
    });
  }
  function goBack() {
    back.start("variants", { run: index, seed, n: 4, strength, source: picture.source, ...conditionOf(run, cond) }, (event) => {
      if (event.kind === "done") setResult((old) => ({ ...old, images: decode(event.images), back: event.command }));
    });
  }
  const submit = (e) => {
    e.preventDefault();
    addNoise();
  };
  const frame = frames[Math.min(frames.length - 1, Math.round(place * (frames.length - 1)))];
  return html`<form onSubmit=${submit} aria-label="Noise" class="two">
    <${ImageSource} index=${index} active=${active} onPicture=${(chosen) => { setPicture(chosen); addNoise(chosen.source); }} />
    <div>
      <div class="bar">
        <${NumberField} label="Seed" value=${seed} min="0" max="2147483647" onChange=${setSeed} />
        <${ConditionFields} run=${run} value=${cond} onChange=${setCond} />
        <button type="submit" class="primary" disabled=${!picture}>Add noise</button>
        <${Status} job=${job} what="Adding noise" />
      </div>
      <${Scrubber} value=${place} onChange=${setPlace} disabled=${!frames.length} from="data" to="noise" />
      <div class="card">
        <div class="pair">
          <${Frame} frame=${frame?.x} label="x_t" />
          <${Frame} frame=${frame?.prediction} label="x̂, the prediction" />
        </div>
        <p class="numbers">${frame ? `t = ${format(frame.t)} · log-SNR ${frame.log_snr == null ? (frame.t < 0.5 ? "∞" : "−∞") : format(frame.log_snr, 2)}` : " "}</p>
        <${Command} text=${result.forward} name="forward" files=${[["image.png", picture?.data]]} />
      </div>
      <div class="card">
        <h2>And back</h2>
        <p>Noise up to the time t, then the reverse process: variants of the image.</p>
        <div class="bar">
          <${NumberField} label="Strength t" value=${strength} min="0.05" max="1" step="0.05" onChange=${setStrength} />
          <button type="button" class="primary" onClick=${goBack} disabled=${!picture}>Make variants</button>
          <${Status} job=${back} what="Making variants" />
        </div>
        ${result.images && html`<${Frame} frame=${result.images} label="four variants" />`}
        <${Command} text=${result.back} name="variants" files=${[["image.png", picture?.data]]} />
      </div>
    </div>
  </form>`;
}

export function Likelihood({ run, index, active }) {
  const [picture, setPicture] = useState(null);
  const [seed, setSeed] = useState(0);
  const [draws, setDraws] = useState(16);
  const [cond, setCond] = useState({});
  const [bound, setBound] = useState(null);
  const [command, setCommand] = useState("");
  const job = useJob();

  function measure(e) {
    e.preventDefault();
    setCommand("");
    job.start("likelihood", { run: index, seed, draws, source: picture.source, ...conditionOf(run, cond) }, (event) => {
      if (event.kind === "bound") setBound(event);
      else if (event.kind === "done") setCommand(event.command);
    });
  }
  const data = useMemo(() => {
    if (!bound) return null;
    const density = bound.bits.map((bits, i) => bits / (bound.edges[i + 1] - bound.edges[i]));
    return [bound.edges, [...density, density.at(-1)]];
  }, [bound]);
  const total = bound && `${format(bound.bits_per_dim)} ± ${format(bound.stderr)} bits per dimension`;
  return html`<form onSubmit=${measure} aria-label="Likelihood" class="two">
    <${ImageSource} index=${index} active=${active} onPicture=${setPicture} />
    <div>
      <div class="bar">
        <${NumberField} label="Seed" value=${seed} min="0" max="2147483647" onChange=${setSeed} />
        <${NumberField} label="Draws of noise" value=${draws} min="2" max="256" onChange=${setDraws} />
        <${ConditionFields} run=${run} value=${cond} onChange=${setCond} />
        <button type="submit" class="primary" disabled=${!picture}>Measure</button>
        <${Status} job=${job} what="Measuring" />
      </div>
      <div class="card">
        ${!bound && html`<p>An upper bound on −log₂ p of this image, and its distribution over log-SNR.</p>`}
        ${bound && html`<p class="result">at most <strong>${total}</strong></p>
          <table><caption class="hidden">Parts of the bound</caption><tbody>
            ${Object.entries(bound.parts).map(([name, bits]) => html`<tr><th scope="row">${name}</th><td>${format(bits, 4)}</td></tr>`)}
          </tbody></table>
          <${Chart} data=${data} stepped series=${[{ label: "bits", colour: "--accent" }]} xLabel="noise ← log-SNR → data"
            yLabel="bits/dim per unit" summary=${`Bits per dimension over log-SNR; the area is the diffusion part, ${format(bound.parts.diffusion)} bits`} />`}
        <${Command} text=${command} name="likelihood" files=${[["image.png", picture?.data]]} />
      </div>
    </div>
  </form>`;
}

export function Interpolate({ run, index, active }) {
  const [pictures, setPictures] = useState([null, null]);
  const [n, setN] = useState(7);
  const [steps, setSteps] = useState(Math.min(20, run.longest));
  const [cond, setCond] = useState({});
  const [result, setResult] = useState({});
  const job = useJob();
  const choose = (i) => (picture) => setPictures((old) => old.map((one, j) => (i === j ? picture : one)));

  function between(e) {
    e.preventDefault();
    const content = { run: index, n, steps, source: pictures[0].source, other: pictures[1].source, ...conditionOf(run, cond) };
    job.start("interpolate", content, (event) => {
      if (event.kind === "done") setResult({ images: { ...decode(event.images), columns: Math.min(n, matchMedia("(max-width: 760px)").matches ? 4 : 16) }, command: event.command });
    });
  }
  return html`<form onSubmit=${between} aria-label="Interpolate">
    <div class="sources">
      <${ImageSource} index=${index} active=${active} label="From" onPicture=${choose(0)} />
      <${ImageSource} index=${index} active=${active} label="To" start=${1} onPicture=${choose(1)} />
    </div>
    <div class="bar">
      <${NumberField} label="Images" value=${n} min="2" max="16" onChange=${setN} />
      <${NumberField} label="Steps each way" value=${steps} min="1" max=${run.longest} onChange=${setSteps} />
      <${ConditionFields} run=${run} value=${cond} onChange=${setCond} />
      <button type="submit" class="primary" disabled=${!pictures[0] || !pictures[1]}>Interpolate</button>
      <${Status} job=${job} what="Interpolating" />
    </div>
    <div class="card">
      ${!result.images && html`<p>The model's flow maps both images to noise, and points between the two noises back to images.</p>`}
      ${result.images && html`<div class="strip"><${Frame} frame=${result.images} label=${`${result.images.n} images, from the first to the second`} /></div>`}
      <${Command} text=${result.command} name="interpolate"
        files=${[["image.png", pictures[0]?.data], ["other.png", pictures[1]?.data]]} />
    </div>
  </form>`;
}
