// Line charts: inline SVG whose user unit is the data's own in x, stretched to the width that there is.
"use strict";

const CHART_HEIGHT = 100;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

// Draw lines [{label, colour, xs, ys, faint: ys or none, dashed}] into `parent`. onPick(x) is called where the pointer picks an x.
// Returns a function that moves the cursor to an x and shows the values there.
function drawChart(parent, title, lines, { onPick, hover = false, unit = "", digits = 2 }) {
  const chart = element("div", "chart"), values = element("div", "values"), plot = element("div", "plot");
  const heading = element("div", "title", title);
  const xs = lines.flatMap((line) => [line.xs[0], line.xs[line.xs.length - 1]]);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const known = lines.flatMap((line) => line.ys.filter((y) => y !== null));
  let [low, high] = [Math.min(...known), Math.max(...known)];
  const top = high, bottom = low;
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  low -= margin;
  high += margin;
  const width = last - first || 1;
  const svg = shape("svg", { viewBox: `${first} 0 ${width} ${CHART_HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", `${title}: ${lines.map((line) => `${line.label} ${short(line.ys[0])} to ${short(line.ys[line.ys.length - 1])}`).join(", ")}`);
  const y = (value) => (CHART_HEIGHT * (high - value)) / (high - low);
  const path = (line, column) => {
    let text = "", pen = "M";
    column.forEach((value, i) => {
      if (value === null) pen = "M";
      else {
        text += `${pen}${line.xs[i]} ${y(value).toFixed(2)}`;
        pen = "L";
      }
    });
    return text;
  };
  for (const line of lines) {
    const style = `stroke: ${line.colour}`;
    if (line.faint) svg.append(shape("path", { d: path(line, line.faint), class: "faint", style }));
    svg.append(shape("path", { d: path(line, line.ys), class: line.dashed ? "dashed" : "", style }));
  }
  const cursor = shape("line", { y1: 0, y2: CHART_HEIGHT, x1: first, x2: first });
  svg.append(cursor);
  const numbers = lines.map((line) => {
    const number = element("span");
    number.style.color = line.colour;
    number.title = line.label;
    values.append(number);
    return number;
  });
  const range = element("div", "range"), ends = element("div", "ends");
  range.append(element("span", "", short(top)), element("span", "", short(bottom)));
  ends.append(element("span", "", short(first)), element("span", "", `${short(last)}${unit}`));
  plot.append(range, svg, ends);
  chart.append(heading, values, plot);
  parent.append(chart);

  const move = (x) => {
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    lines.forEach((line, i) => {
      let nearest = 0;
      line.xs.forEach((value, k) => {
        if (Math.abs(value - x) < Math.abs(line.xs[nearest] - x)) nearest = k;
      });
      numbers[i].textContent = short(line.ys[nearest], digits).replace(/^(-?)0\./, "$1.");
    });
  };
  const picked = (event) => {
    const box = svg.getBoundingClientRect();
    return first + width * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  if (onPick) {
    svg.addEventListener("pointerdown", (event) => {
      svg.setPointerCapture(event.pointerId);
      onPick(picked(event));
    });
    svg.addEventListener("pointermove", (event) => svg.hasPointerCapture(event.pointerId) && onPick(picked(event)));
  }
  if (hover) {
    const show = (x, seen) => {
      move(x);
      cursor.style.visibility = seen ? "visible" : "hidden";
    };
    svg.addEventListener("pointermove", (event) => show(picked(event), true));
    svg.addEventListener("pointerleave", () => show(last, false));
    cursor.style.visibility = "hidden";
  }
  move(hover ? last : first);
  return move;
}

function drawLosses(data) {
  const axis = document.getElementById("axis");
  const draw = () => {
    for (const figure of document.querySelectorAll("#losses figure")) {
      figure.replaceChildren();
      const lines = Object.entries(data.losses[figure.dataset.name]).map(([run, line]) => ({
        ...data.colours[run], xs: line[axis.value], ys: line.smooth, faint: line.raw,
      }));
      drawChart(figure, figure.dataset.name, lines, { hover: true, digits: 4, unit: axis.value === "step" ? " steps" : " s" });
    }
  };
  axis.addEventListener("change", draw);
  draw();
}
