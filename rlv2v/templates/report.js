// All clips of the page under one clock. A clip is one video whose frames hold its panels as tiles, see report_video.py.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const parsed = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve)); // the videos stand at the end

// One clip: its video, the frame of it that is on display, and the canvases that show its tiles.
class Clip {
  constructor(number) {
    Object.assign(this, data.clips[number]);
    this.number = number;
    this.article = document.querySelector(`.clip[data-clip="${number}"]`);
    this.views = []; // {canvas, panel}
    this.shown = 0; // frame on display
    this.near = false; // on the screen, or in the full-size view
    this.loaded = false;
    this.picture = new Image();
    this.ready = new Promise((resolve) => {
      this.picture.addEventListener("load", () => {
        this.draw();
        resolve();
      });
    });
    this.picture.src = this.poster;
    for (const [views, parent] of [[this.views, this.article], [[], document.querySelector(`.first[data-clip="${number}"]`)]]) {
      for (const canvas of parent.querySelectorAll("canvas")) {
        const view = { canvas, panel: Number((canvas.dataset.panel ?? canvas.parentElement.dataset.panel)) };
        this.fitCanvas(canvas);
        if (views === this.views) views.push(view);
        else this.picture.addEventListener("load", () => this.drawTile(view)); // the first frame stays
      }
    }
    const xs = Array.from({ length: this.frames }, (_, k) => k + 1);
    this.cursors = Object.entries(this.curves).map(([title, rows]) => {
      const lines = Object.entries(rows).map(([row, ys]) => ({ ...data.colours[row], xs, ys, dashed: row === "source" || row === "truth" }));
      return drawChart(this.article.querySelector(".charts"), title, lines, { onPick: (x) => player.seek(Math.round(x) - 1) });
    });
  }

  fitCanvas(canvas) {
    canvas.width = this.width;
    canvas.height = this.height;
  }

  // Load the video from the text that stands in the page; a blob, since not every browser seeks in a data: URL.
  async load() {
    if (this.loaded) return;
    this.loaded = true;
    await parsed;
    const response = await fetch(`data:video/mp4;base64,${byId(`video-${this.number}`).textContent}`);
    const video = document.createElement("video");
    Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: URL.createObjectURL(await response.blob()) });
    await new Promise((resolve) => video.addEventListener("loadeddata", resolve, { once: true }));
    this.video = this.picture = video;
    this.draw();
    video.addEventListener("seeked", () => {
      if (this.target !== undefined) this.seek(this.target); // where the scrubber has moved meanwhile
      // Chromium sometimes has no callback for the last frame of two seeks that follow each other closely.
      const settled = () => video.paused && !this.seeking && this.present(video.currentTime);
      requestAnimationFrame(() => requestAnimationFrame(settled));
    });
    if (video.requestVideoFrameCallback) {
      const onFrame = (_, frame) => {
        this.present(frame.mediaTime);
        video.requestVideoFrameCallback(onFrame);
      };
      video.requestVideoFrameCallback(onFrame);
    }
    player.place(this);
  }

  present(time) {
    this.shown = Math.min(this.frames - 1, Math.floor(time * data.fps + 0.01));
    this.draw();
  }

  seek(frame) {
    if (!this.video) return;
    frame = Math.min(frame, this.frames - 1);
    const time = (frame + 0.5) / data.fps;
    this.target = this.video.seeking ? frame : undefined;
    const isThere = this.shown === frame && Math.abs(this.video.currentTime - time) < 0.01 / data.fps;
    if (!this.video.seeking && !isThere) this.video.currentTime = time;
  }

  get seeking() {
    return Boolean(this.video) && (this.video.seeking || this.target !== undefined);
  }

  draw() {
    for (const view of this.views) this.drawTile(view);
    for (const move of this.cursors ?? []) move(this.shown + 1);
  }

  drawTile({ canvas, panel }) {
    const x = (panel % this.columns) * this.stride[0] + this.margin, y = Math.floor(panel / this.columns) * this.stride[1] + this.margin;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = !this.small; // of an enlarged pixel, its middle
    context.drawImage(this.picture, x, y, ...this.tile, 0, 0, this.width, this.height);
    canvas.dataset.frame = this.shown;
  }

  // Size a canvas in a space: small clips by whole pixels; large ones fill it, up to their own size where `own` is set.
  place(canvas, space, height = Infinity, own = false) {
    const scale = Math.min(space / this.width, height / this.height);
    const factor = scale >= 1 && (this.small || own) ? Math.floor(scale) : scale;
    canvas.style.width = `${Math.floor(this.width * factor)}px`;
    canvas.style.height = `${Math.floor((Math.floor(this.width * factor) * this.height) / this.width)}px`;
    canvas.classList.toggle("whole", this.small && factor >= 1);
  }
}

// The clock: a position in frames that all near clips follow. It waits for the slowest, so that they stay together.
const player = {
  clips: [],
  position: 0,
  playing: false,
  speed: 1,
  get frames() {
    return Math.max(...this.clips.map((clip) => clip.frames));
  },

  start() {
    this.clips = data.clips.map((_, number) => new Clip(number));
    byId("scrubber").max = this.frames - 1;
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const clip = this.clips[entry.target.dataset.clip];
        clip.near = entry.isIntersecting;
        this.place(clip);
      }
    }, { root: document.querySelector("main"), rootMargin: "30% 0px" });
    for (const clip of this.clips) watcher.observe(clip.article);
    this.show();
  },

  // Bring one clip to where the clock is.
  place(clip) {
    if (clip.near || clip === view.clip) clip.load();
    if (!clip.video) return;
    if (!this.active(clip)) clip.video.pause();
    clip.seek(Math.floor(this.position));
  },

  active(clip) {
    return this.playing && Boolean(clip.video) && (view.clip ? clip === view.clip : clip.near);
  },

  seek(frame) {
    this.position = Math.min(this.frames - 1, Math.max(0, frame));
    for (const clip of this.clips) this.place(clip);
    this.show();
  },

  step(frames) {
    this.pause();
    this.seek(Math.floor(this.position) + frames);
  },

  play() {
    if (this.playing) return;
    this.playing = true;
    if (Math.floor(this.position) >= this.frames - 1) this.seek(0);
    this.then = performance.now();
    this.show();
    requestAnimationFrame((now) => this.tick(now));
  },

  pause() {
    this.playing = false;
    for (const clip of this.clips) clip.video?.pause();
    this.seek(Math.floor(this.position));
  },

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  },

  tick(now) {
    if (!this.playing) return;
    const passed = Math.min(0.25, (now - this.then) / 1000); // a page in the background stands still
    this.then = now;
    const active = this.clips.filter((clip) => this.active(clip));
    const running = active.filter((clip) => Math.floor(this.position) < clip.frames - 1);
    const slowest = Math.min(...running.map((clip) => (clip.seeking ? -Infinity : clip.shown + 2)));
    this.position = Math.max(this.position, Math.min(slowest, this.position + passed * data.fps * this.speed));
    if (this.position >= this.frames) this.seek(0); // from the start again
    for (const clip of active) this.steer(clip);
    this.show();
    requestAnimationFrame((next) => this.tick(next));
  },

  // Keep a video that plays within a frame of the clock by its speed; one far off is sent there.
  steer(clip) {
    const video = clip.video;
    if (clip.seeking) return;
    const time = video.currentTime * data.fps;
    const missed = video.paused ? Math.floor(time + 0.01) !== clip.shown : time - clip.shown > 2.5; // a callback that did not come
    if (missed || !video.requestVideoFrameCallback) clip.present(video.currentTime);
    if (Math.floor(this.position) >= clip.frames - 1) {
      if (!video.paused) video.pause();
      clip.seek(clip.frames - 1);
      return;
    }
    const ahead = time - this.position - 0.5;
    if (Math.abs(ahead) > 4) {
      video.pause();
      clip.seek(Math.floor(this.position));
      return;
    }
    video.playbackRate = Math.max(0.0625, this.speed * Math.min(1.5, Math.max(0.5, 1 - ahead / 4)));
    if (video.paused && ahead < 1) video.play().catch(() => {});
    else if (!video.paused && ahead > 1.5) video.pause();
  },

  show() {
    const frame = Math.floor(this.position), scrubber = byId("scrubber");
    scrubber.value = frame;
    scrubber.setAttribute("aria-valuetext", `frame ${frame + 1} of ${this.frames}`);
    byId("frame").textContent = `${frame + 1} / ${this.frames}`;
    byId("play").setAttribute("aria-pressed", this.playing);
    byId("play").setAttribute("aria-label", this.playing ? "Pause" : "Play");
  },
};

// The full-size view: two panels of one clip on top of each other, the left one up to the divider.
const view = {
  clip: null,
  at: 50, // percent
  left: "source", // keys of panels; they stay from clip to clip
  right: "0",

  open(clip, panel) {
    if (panel !== undefined && clip.panels[panel] !== "source") this.right = clip.panels[panel];
    this.close(false);
    this.clip = clip;
    if (!clip.panels.includes(this.right)) this.right = clip.panels[1];
    byId("view-name").textContent = document.getElementById(`clip-${clip.number}`).textContent;
    for (const side of ["left", "right"]) {
      const choices = clip.panels.map((key) => new Option(data.colours[key].label, key, false, key === this[side]));
      byId(side).replaceChildren(...choices);
      const canvas = byId(`${side}-canvas`);
      clip.fitCanvas(canvas);
      this[`${side}View`] = { canvas, panel: 0 };
      clip.views.push(this[`${side}View`]);
    }
    this.choose();
    if (!byId("view").open) {
      byId("view").append(byId("bar"));
      byId("view").showModal();
      byId("divider").focus();
    }
    this.fit();
    player.seek(Math.floor(player.position));
  },

  choose() {
    for (const side of ["left", "right"]) {
      this[side] = byId(side).value;
      this[`${side}View`].panel = this.clip.panels.indexOf(this[side]);
      byId(`${side}-canvas`).setAttribute("aria-label", `${side}: ${data.colours[this[side]].label}`);
      this.clip.drawTile(this[`${side}View`]);
    }
  },

  fit() {
    if (!this.clip) return;
    const stage = document.querySelector(".stage"), style = getComputedStyle(stage);
    const width = stage.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const height = stage.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    this.clip.place(document.querySelector(".picture"), width, height, true);
    for (const side of ["left", "right"]) byId(`${side}-canvas`).classList.toggle("whole", this.clip.small);
  },

  divide(percent) {
    this.at = Math.min(100, Math.max(0, percent));
    document.querySelector(".picture").style.setProperty("--at", `${this.at}%`);
    byId("divider").setAttribute("aria-valuenow", Math.round(this.at));
  },

  close(really = true) {
    if (this.clip) this.clip.views = this.clip.views.filter((entry) => entry !== this.leftView && entry !== this.rightView);
    this.clip = null;
    if (really) {
      document.body.append(byId("bar"));
      player.seek(Math.floor(player.position));
    }
  },

  move(clips) {
    this.open(player.clips[(this.clip.number + clips + player.clips.length) % player.clips.length]);
  },

  start() {
    const picture = document.querySelector(".picture");
    const drag = (event) => {
      const box = picture.getBoundingClientRect();
      this.divide((100 * (event.clientX - box.left)) / box.width);
    };
    picture.addEventListener("pointerdown", (event) => {
      picture.setPointerCapture(event.pointerId);
      byId("divider").focus();
      drag(event);
      event.preventDefault();
    });
    picture.addEventListener("pointermove", (event) => picture.hasPointerCapture(event.pointerId) && drag(event));
    byId("divider").addEventListener("keydown", (event) => {
      const to = { ArrowLeft: this.at - 2, ArrowRight: this.at + 2, Home: 0, End: 100 }[event.key];
      if (to === undefined) return;
      this.divide(to);
      event.preventDefault(); // the keys step through the frames elsewhere
    });
    byId("left").addEventListener("change", () => this.choose());
    byId("right").addEventListener("change", () => this.choose());
    byId("previous").addEventListener("click", () => this.move(-1));
    byId("next").addEventListener("click", () => this.move(1));
    byId("close").addEventListener("click", () => byId("view").close());
    byId("view").addEventListener("close", () => this.close());
    for (const button of document.querySelectorAll(".panel")) {
      button.addEventListener("click", () => this.open(player.clips[button.closest(".clip").dataset.clip], button.dataset.panel));
    }
    new ResizeObserver(() => this.fit()).observe(document.querySelector(".stage"));
  },
};

function fitCanvases() {
  for (const canvas of document.querySelectorAll(".clip canvas, .first canvas")) {
    const clip = player.clips[canvas.closest("[data-clip]").dataset.clip];
    clip.place(canvas, canvas.parentElement.clientWidth, canvas.closest(".first") ? Infinity : 560);
  }
}

function onKey(event) {
  const focus = document.activeElement;
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || focus?.tagName === "SELECT") return;
  const isControl = focus?.matches("summary, button:not(.panel)"); // which has its own use for the space bar
  const actions = {
    " ": isControl ? undefined : () => player.toggle(),
    ArrowLeft: () => player.step(-1),
    ArrowRight: () => player.step(1),
    Home: () => player.step(-Infinity),
    End: () => player.step(Infinity),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  if (event.type === "keydown") actions[event.key]();
}

function start() {
  if (byId("axis")) drawLosses(data);
  if (!data.clips.length) return;
  const clips = document.querySelector(".clips"), firsts = document.querySelector(".firsts");
  const most = Math.max(...data.clips.map((clip) => clip.panels.length)), large = data.clips.some((clip) => !clip.small);
  for (const list of [clips, firsts]) {
    list.style.setProperty("--most", most);
    list.classList.toggle("large", large);
  }
  player.start();
  view.start();
  fitCanvases();
  new ResizeObserver(fitCanvases).observe(clips);
  byId("play").addEventListener("click", () => player.toggle());
  byId("back").addEventListener("click", () => player.step(-1));
  byId("forth").addEventListener("click", () => player.step(1));
  byId("scrubber").addEventListener("input", (event) => player.seek(Number(event.target.value)));
  byId("speed").addEventListener("change", (event) => {
    player.speed = Number(event.target.value);
    event.target.blur();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => event.key === " " && onKey(event)); // Firefox clicks a button on release
}

start();
