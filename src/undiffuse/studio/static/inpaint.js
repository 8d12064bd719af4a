// Paint over the part of an image that the model fills in.

import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { decode } from "./pixels.js";
import { Command, ConditionFields, Field, Frame, ImageSource, NumberField, SelectField, Status, conditionOf, counted, useJob } from "./widgets.js";

const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export function Inpaint({ run, index, names, active }) {
  const [picture, setPicture] = useState(null);
  const [mask, setMask] = useState(null);
  const [erasing, setErasing] = useState(false);
  const [brush, setBrush] = useState(Math.max(1, Math.round(run.shape.at(-1) / 8)));
  const [options, setOptions] = useState({ n: 4, seed: 0, steps: Math.min(50, run.longest), method: "mmps" });
  const [cond, setCond] = useState({});
  const [result, setResult] = useState({});
  const job = useJob();
  const set = (what) => setOptions({ ...options, ...what });

  const [height, width] = run.shape.slice(1);
  const painted = mask?.some((v) => v) ?? false;
  const empty = () => new Uint8Array(height * width);
  const half = () => empty().map((_, i) => (i % width >= width / 2 ? 1 : 0));
  const choose = (chosen) => {
    setPicture(chosen);
    setMask((old) => old ?? empty());
  };
  function fill(e) {
    e.preventDefault();
    const { n, seed, steps, method } = options;
    const content = { run: index, n, seed, steps, method, source: picture.source, mask: bits(mask), ...conditionOf(run, cond) };
    job.start("inpaint", content, (event) => {
      if (event.kind === "done") setResult({ images: decode(event.images), command: event.command, mask });
    });
  }
  return html`<form onSubmit=${fill} aria-label="Inpaint" class="two">
    <${ImageSource} index=${index} active=${active} onPicture=${choose} />
    <div>
      <div class="card">
        <div class="pair paint">
          <${Painter} picture=${picture} mask=${mask} brush=${brush} erasing=${erasing} width=${width} height=${height} onMask=${setMask} />
          <${Frame} frame=${result.images} label="filled in" />
        </div>
        <div class="bar">
          <${Field} label=${`Brush, ${counted(brush, "pixel")}`}>
            <input type="range" min="1" max=${Math.max(2, Math.round(width / 2))} value=${brush} onInput=${(e) => setBrush(Number(e.target.value))} />
          <//>
          <button type="button" class="toggle" aria-pressed=${erasing} onClick=${() => setErasing(!erasing)} disabled=${!picture}>Erase</button>
          <button type="button" onClick=${() => setMask(half())} disabled=${!picture}>Hide the right half</button>
          <button type="button" onClick=${() => setMask(mask.map((v) => 1 - v))} disabled=${!picture}>Invert</button>
          <button type="button" onClick=${() => setMask(empty())} disabled=${!painted}>Clear</button>
        </div>
        <div class="bar">
          <${NumberField} label="Answers" value=${options.n} min="1" max="16" onChange=${(n) => set({ n })} />
          <${NumberField} label="Seed" value=${options.seed} min="0" max="2147483647" onChange=${(seed) => set({ seed })} />
          <${NumberField} label="Steps" value=${options.steps} min="1" max=${run.longest} onChange=${(steps) => set({ steps })} />
          <${SelectField} label="Method" value=${options.method} options=${names.methods.map((name) => [name, name])} onChange=${(method) => set({ method })} />
          <${ConditionFields} run=${run} value=${cond} onChange=${setCond} />
          <button type="submit" class="primary" disabled=${!picture || !painted}>Fill in</button>
          <${Status} job=${job} what="Filling in" />
        </div>
        <${Command} text=${result.command} name="inpaint"
          files=${[["image.png", picture?.data], ["mask.png", result.mask && maskData(result.mask, width, height)]]} />
      </div>
    </div>
  </form>`;
}

function Painter({ picture, mask, brush, erasing, width, height, onMask }) {
  const canvas = useRef(null);
  const stroke = useRef(null);
  const [cursor, setCursor] = useState([Math.floor(height / 2), Math.floor(width / 2)]);
  const [focused, setFocused] = useState(false);

  useEffect(() => {
    if (!picture || !mask) return;
    const context = canvas.current.getContext("2d");
    const shown = new ImageData(new Uint8ClampedArray(picture.data.data), width, height);
    mask.forEach((hidden, i) => hidden && shown.data.set([226, 74, 106, 255], 4 * i));
    context.putImageData(shown, 0, 0);
    if (focused) {
      context.strokeStyle = "#2f7df6";
      context.strokeRect(cursor[1] - brush / 2 + 0.5, cursor[0] - brush / 2 + 0.5, brush, brush);
    }
  }, [picture, mask, cursor, focused, brush]);

  function paint(row, column, value) {
    const changed = mask.slice();
    const reach = (brush - 1) / 2;
    for (let i = Math.ceil(row - reach - 0.5); i <= row + reach; i++) {
      for (let j = Math.ceil(column - reach - 0.5); j <= column + reach; j++) {
        if (i >= 0 && j >= 0 && i < height && j < width) changed[i * width + j] = value;
      }
    }
    onMask(changed);
  }
  const at = (e) => {
    const box = canvas.current.getBoundingClientRect();
    return [Math.floor(((e.clientY - box.top) / box.height) * height), Math.floor(((e.clientX - box.left) / box.width) * width)];
  };
  const down = (e) => {
    if (!mask) return;
    canvas.current.setPointerCapture(e.pointerId);
    stroke.current = erasing || e.button === 2 || e.shiftKey ? 0 : 1;
    paint(...at(e), stroke.current);
  };
  const move = (e) => stroke.current !== null && paint(...at(e), stroke.current);
  const key = (e) => {
    const step = KEYS[e.key];
    if (step) setCursor(([i, j]) => [Math.min(height - 1, Math.max(0, i + step[0])), Math.min(width - 1, Math.max(0, j + step[1]))]);
    else if (e.key === " " && mask) paint(...cursor, 1);
    else if (e.key === "Backspace" && mask) paint(...cursor, 0);
    else return;
    e.preventDefault();
  };
  return html`<figure class="frame">
    <canvas ref=${canvas} class="painter" width=${width} height=${height} tabindex="0" role="application"
      aria-label="Mask: drag to paint the part to fill in; arrow keys move the brush, space paints, backspace erases"
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${() => (stroke.current = null)} onPointerCancel=${() => (stroke.current = null)}
      onContextMenu=${(e) => e.preventDefault()} onKeyDown=${key} onFocus=${() => setFocused(true)} onBlur=${() => setFocused(false)}></canvas>
    <figcaption>paint the part to fill in</figcaption>
  </figure>`;
}

function bits(mask) {
  const bytes = new Uint8Array(Math.ceil(mask.length / 8));
  mask.forEach((hidden, i) => { if (hidden) bytes[i >> 3] |= 128 >> (i & 7); });
  return btoa(String.fromCharCode(...bytes));
}

function maskData(mask, width, height) {
  const data = new ImageData(width, height);
  mask.forEach((hidden, i) => data.data.set([255 * hidden, 255 * hidden, 255 * hidden, 255], 4 * i));
  return data;
}
