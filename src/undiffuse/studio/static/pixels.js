// Images from the server (bytes in base 64, 8 bits a channel) on canvases and in PNG files.

export function decode(image) {
  const text = atob(image.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return { ...image, bytes };
}

// The n images of a frame as one ImageData each.
export function toImageData({ n, channels, height, width, bytes }) {
  const size = height * width;
  return Array.from({ length: n }, (_, item) => {
    const data = new ImageData(width, height);
    for (let i = 0; i < size; i++) {
      const from = (item * size + i) * channels;
      for (let c = 0; c < 3; c++) data.data[4 * i + c] = bytes[from + (channels === 1 ? 0 : c)];
      data.data[4 * i + 3] = 255;
    }
    return data;
  });
}

export const columnsOf = (n) => Math.ceil(Math.sqrt(n));

const SIDE = 360;
const GAP = 4;

// Draws the images of a frame as a mosaic, enlarged by a whole factor, or points as a scatter plot.
export function draw(canvas, frame, range) {
  if (frame.points) return drawPoints(canvas, frame.points, range);
  const columns = frame.columns ?? columnsOf(frame.n);
  const rows = Math.ceil(frame.n / columns);
  const scale = Math.max(1, Math.round(SIDE / (Math.min(columns, rows) * frame.width)));
  const [across, down] = [frame.width * scale, frame.height * scale];
  const gap = frame.n === 1 ? 0 : GAP;
  canvas.width = columns * (across + gap) - gap;
  canvas.height = rows * (down + gap) - gap;
  const small = document.createElement("canvas");
  [small.width, small.height] = [frame.width, frame.height];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  toImageData(frame).forEach((data, i) => {
    small.getContext("2d").putImageData(data, 0, 0);
    context.drawImage(small, (i % columns) * (across + gap), Math.floor(i / columns) * (down + gap), across, down);
  });
}

function drawPoints(canvas, points, [low, high]) {
  const side = 480;
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  context.fillStyle = style.getPropertyValue("--accent");
  const at = (v) => ((v - low) / (high - low)) * side;
  for (const [x, y] of points) context.fillRect(at(x) - 1.5, side - at(y) - 1.5, 3, 3);
}

export function rangeOf(points) {
  const most = Math.max(...points.flat().map(Math.abs), 1e-9);
  return [-1.1 * most, 1.1 * most];
}

// A PNG file of one ImageData, for the commands that read it.
export function savePNG(data, name) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [data.width, data.height];
  canvas.getContext("2d").putImageData(data, 0, 0);
  canvas.toBlob((blob) => save(blob, name), "image/png");
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
