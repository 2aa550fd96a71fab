// The page at /: a client of the API like any other, without libraries and without a build step.

const $ = (id) => document.getElementById(id);
const PHASES = ["preparing", "refining", "class_images", "discriminating", "training", "drawing", "evaluating", "storing"];
const words = (name) => name.replaceAll("_", " ");
const MEASURES = [["dino", "DINO"], ["clip_i", "CLIP-I"], ["clip_t", "CLIP-T"]];

// --- The API

const key = { get: () => sessionStorage.getItem("key"), set: (text) => sessionStorage.setItem("key", text) };

class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? problem.title ?? `the server answered ${status}`);
    Object.assign(this, { status, problem });
  }
}

async function ask(path, request = {}) {
  const headers = new Headers(request.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let answer;
  try {
    answer = await fetch(path, { ...request, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) show("key", true);
  throw new ApiError(answer.status, await answer.json().catch(() => ({})));
}

const read = async (path, request) => (await ask(path, request)).json();
const post = (path, body) =>
  read(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// --- The page

function show(id, visible) {
  $(id).hidden = !visible;
}

function note(id, text) {
  $(id).textContent = text ?? "";
  show(id, Boolean(text));
}

/** An element with attributes and children. Text is never parsed as HTML. */
function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const time = (text) => new Date(text).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
const bytes = (n) => (n < 1e6 ? `${Math.ceil(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function duration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Runs the task of a form or button, and shows its error beside it. */
async function attempt(noteId, task) {
  note(noteId);
  try {
    await task();
  } catch (error) {
    if (error.name !== "AbortError") note(noteId, error.message);
  }
}

// --- Photos

let photos = []; // { file, url, seen }
let looking = 0;

function add(files) {
  for (const file of files) {
    if (file.type.startsWith("image/")) photos.push({ file, url: URL.createObjectURL(file), seen: null });
  }
  photos.splice(5).forEach((photo) => URL.revokeObjectURL(photo.url));
  inspect();
}

async function inspect() {
  const asked = ++looking;
  paint();
  if (!photos.length) return note("photos-note");
  const form = new FormData();
  photos.forEach((photo) => form.append("images", photo.file));
  const name = $("class-name").value.trim();
  if (name) form.append("class_name", name);
  form.append("model", $("model").value);
  try {
    const found = await read("/v1/photos/inspect", { method: "POST", body: form });
    if (asked !== looking) return; // the photos have changed meanwhile
    found.photos.forEach((seen, i) => (photos[i].seen = seen));
    const twice = found.duplicates.map(([a, b]) => `photos ${a + 1} and ${b + 1} show the same picture`);
    note("photos-note", [...twice, ...found.warnings.map(({ message }) => message)].join("; "));
  } catch (error) {
    if (asked === looking) note("photos-note", error.message);
  }
  paint();
}

function remarks({ seen }) {
  if (!seen) return [["soft", "checking..."]];
  if (seen.problem) return [["bad", seen.problem.detail]];
  const odd = [...(seen.inspection?.warnings ?? []), ...(seen.product?.warnings ?? [])].map((word) => ["odd", word]);
  const refusal = seen.product?.refusal;
  return refusal ? [["bad", refusal], ...odd] : odd.length ? odd : [["soft", "good"]];
}

function paint() {
  $("photos").replaceChildren(
    ...photos.map((photo, i) => {
      const cut = photo.seen?.product?.preview;
      const pair = element("div", { className: cut ? "pair" : "" }, element("img", { src: photo.url, alt: `Photo ${i + 1}` }));
      if (cut) pair.append(element("img", { src: cut, alt: `The product found in photo ${i + 1}` }));
      const away = element("button", { type: "button", textContent: "Remove", onclick: () => (URL.revokeObjectURL(photo.url), photos.splice(i, 1), inspect()) });
      away.setAttribute("aria-label", `Remove photo ${i + 1}`);
      const said = remarks(photo).map(([kind, text]) => element("span", { className: kind, textContent: `${text} ` }));
      return element("li", {}, pair, ...said, away);
    }),
  );
  const good = photos.every((photo) => !photo.seen?.problem);
  $("start").disabled = photos.length < 3 || !good;
  $("start").textContent = photos.length && photos.length < 3 ? `Start training (${3 - photos.length} more photos)` : "Start training";
}

$("files").addEventListener("change", () => (add($("files").files), ($("files").value = "")));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => event.clipboardData.files.length && add(event.clipboardData.files));

$("new").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("new-note", async () => {
    let options = {};
    try {
      options = JSON.parse($("options").value || "{}");
    } catch (error) {
      throw new Error(`Options: ${error.message}`);
    }
    const form = new FormData();
    photos.forEach((photo) => form.append("images", photo.file));
    form.append("class_name", $("class-name").value.trim());
    form.append("model", $("model").value);
    form.append("options", JSON.stringify({ method: $("method").value, ...options }));
    $("start").disabled = true;
    try {
      // With an Idempotency-Key a second click or a lost response creates no second training.
      const job = await read("/v1/jobs", { method: "POST", body: form, headers: { "Idempotency-Key": crypto.randomUUID() } });
      photos.forEach((photo) => URL.revokeObjectURL(photo.url));
      photos = [];
      location.hash = `job=${job.id}`;
    } finally {
      paint();
    }
  });
});

// --- One training

let open = null; // { id, stop, losses, images }

async function follow(id) {
  open?.stop.abort();
  const here = (open = { id, stop: new AbortController(), losses: [], shown: null });
  ["shown-pictures", "images", "files-list", "drawn", "plot"].forEach((name) => $(name).replaceChildren());
  ["curve", "shown", "result", "draw", "draw-bar"].forEach((name) => show(name, false));
  note("fault");
  let wait = 1000;
  while (open === here) {
    try {
      await events(here);
      return;
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status && error.status < 500) return note("fault", error.message), show("job", true);
      await new Promise((done) => setTimeout(done, wait)); // the server is unavailable: try again
      wait = Math.min(2 * wait, 15000);
    }
  }
}

/** Server-sent events by fetch, since an EventSource cannot send a key. */
async function events(here) {
  const answer = await ask(`/v1/jobs/${here.id}/events`, { signal: here.stop.signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream was cut");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: ?(.*)/s)));
      if (fields.event === "job") await paintJob(here, JSON.parse(fields.data));
      if (fields.event === "end") return;
    }
  }
}

async function paintJob(here, job) {
  if (open !== here) return;
  show("job", true);
  $("job-title").textContent = job.class_name;
  $("state").textContent = job.cancel_requested && job.state === "running" ? "canceling" : job.state;
  $("state").className = `state ${job.state}`;
  const waiting = job.waiting_for === "worker" ? "waits for a worker" : `${job.queue_position} ahead in the queue`;
  const place = job.queue_position === null ? "" : `${waiting}, `;
  const model = job.model ? `${job.model.name}, ` : "";
  $("facts").textContent = `${place}${model}${words(job.options.method)}, ${job.options.steps} steps, seed ${job.seed}, ${time(job.created_at)}`;
  const ended = ["succeeded", "failed", "canceled"].includes(job.state);
  show("cancel", !ended);
  show("delete", ended);
  note("fault", job.error?.message);
  note("warnings", job.warnings.map(({ message }) => message).join("; "));
  paintProgress(here, job, ended);
  const progress = job.progress;
  if (progress?.phase === "training" && progress.loss !== null) {
    if (here.losses.at(-1)?.[0] >= progress.step) here.losses = here.losses.filter(([step]) => step < progress.step);
    here.losses.push([progress.step, progress.loss]);
    plot(here.losses, job.options.steps);
  }
  // New files appear when a phase ends and with each new picture.
  const seen = `${progress?.phase} ${progress?.images}`;
  if (ended || seen !== here.shown) {
    here.shown = seen;
    await paintFiles(here, job);
  }
  if (ended) list();
}

function paintProgress(here, job, ended) {
  const at = PHASES.indexOf(job.progress?.phase);
  show("phases", !ended);
  $("phases").replaceChildren(
    ...PHASES.map((name, i) => {
      const item = element("li", { textContent: words(name), className: i < at ? "done" : "" });
      if (i === at) item.setAttribute("aria-current", "step");
      return item;
    }),
  );
  const progress = job.progress;
  show("progress", Boolean(progress) && !ended);
  if (!progress) return;
  $("bar").removeAttribute("value");
  if (progress.total) Object.assign($("bar"), { max: progress.total, value: progress.step });
  $("doing").textContent = `${words(progress.phase)} ${progress.total ? `${progress.step} of ${progress.total}` : ""}`;
  $("eta").textContent = progress.eta_seconds === null ? "" : `about ${duration(progress.eta_seconds)} left`;
}

/** A polyline of moving averages, so that noise does not hide the trend. */
function plot(losses, steps) {
  if (losses.length < 2) return;
  show("curve", true);
  const window = Math.max(1, Math.round(losses.length / 40));
  const smooth = losses.map(([step], i) => {
    const near = losses.slice(Math.max(0, i - window), i + window + 1);
    return [step, near.reduce((sum, [, loss]) => sum + loss, 0) / near.length];
  });
  const values = smooth.map(([, loss]) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (step) => 45 + (545 * step) / steps;
  const y = (loss) => 10 + 130 * (high > low ? (high - loss) / (high - low) : 0.5);
  const svg = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    made.textContent = text;
    return made;
  };
  $("plot").replaceChildren(
    svg("line", { x1: 45, x2: 590, y1: 140, y2: 140 }),
    svg("text", { x: 40, y: 14, "text-anchor": "end" }, high.toPrecision(2)),
    svg("text", { x: 40, y: 140, "text-anchor": "end" }, low.toPrecision(2)),
    svg("text", { x: 45, y: 160 }, "step 0"),
    svg("text", { x: 590, y: 160, "text-anchor": "end" }, String(steps)),
    svg("polyline", { points: smooth.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") }),
  );
}

const TITLES = [
  [/^mask-(\d+)/, (n) => `the product in photo ${+n + 1}`],
  [/^view-(\d+)/, (n) => `view ${+n + 1}`],
  [/^attention-(\d+)/, (n) => `what the discriminator looks at, photo ${+n + 1}`],
  [/^preview-(\d+)/, (n) => `after ${n} steps`],
];

async function paintFiles(here, job) {
  const { data } = await read(`/v1/jobs/${here.id}/artifacts`, { signal: here.stop.signal });
  if (open !== here) return;
  const numbered = (name) => Number(name.match(/\d+/)?.[0] ?? 0);
  const seen = TITLES.flatMap(([pattern, title]) =>
    data
      .filter(({ name }) => pattern.test(name))
      .sort((a, b) => numbered(a.name) - numbered(b.name))
      .slice(pattern.source.startsWith("^view") ? -4 : -8)
      .map((file) => picture(file.url, title(file.name.match(pattern)[1]))),
  );
  $("shown-pictures").replaceChildren(...seen);
  show("shown", seen.length > 0);
  if (job.state !== "succeeded") return;
  const report = await read(`/v1/jobs/${here.id}/report`, { signal: here.stop.signal });
  if (open !== here) return;
  const images = data.filter(({ name }) => name.startsWith("image-")).sort((a, b) => numbered(a.name) - numbered(b.name));
  $("images").replaceChildren(...images.map((file, i) => picture(file.url, ...described(report.images?.[i]))));
  $("files-list").replaceChildren(
    ...data
      .filter(({ name }) => !/^(mask|view|attention|preview|image)-/.test(name))
      .map(({ name, url, size }) => element("a", { href: url, textContent: `${name} (${bytes(size)})`, target: "_blank", rel: "noopener" })),
  );
  $("worth").textContent = (report.warnings ?? []).join("; ");
  show("result", true);
  show("draw", true);
}

/** A picture's prompt and scores, each from -1 to 1. */
function described(image) {
  if (!image) return [];
  const measured = MEASURES.filter(([name]) => typeof image.fidelity?.[name] === "number");
  return [image.prompt, measured.map(([name, title]) => `${title} ${image.fidelity[name].toFixed(2)}`).join(", ")];
}

function picture(url, caption = "", more = "") {
  const image = element("img", { src: url, alt: caption, loading: "lazy" });
  const link = element("a", { href: url, target: "_blank", rel: "noopener" }, image);
  return element("li", {}, link, caption, more && element("br"), more && element("span", { className: "soft", textContent: more }));
}

$("cancel").addEventListener("click", () => attempt("fault", () => ask(`/v1/jobs/${open.id}/cancel`, { method: "POST" })));
$("delete").addEventListener("click", () =>
  attempt("fault", async () => {
    if (!confirm("Delete this training, its photos and all its pictures?")) return;
    await ask(`/v1/jobs/${open.id}`, { method: "DELETE" });
    location.hash = "";
  }),
);

// --- Drawing

$("draw").addEventListener("submit", (event) => {
  event.preventDefault();
  const here = open;
  attempt("draw-note", async () => {
    const prompts = $("prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);
    const spec = { prompts, n: Number($("n").value) };
    for (const name of ["guidance", "seed"]) if ($(name).value) spec[name] = Number($(name).value);
    let sample = await post(`/v1/jobs/${here.id}/sample`, spec);
    show("draw-bar", true);
    while (!["succeeded", "failed", "canceled"].includes(sample.state) && open === here) {
      const { progress } = sample;
      $("draw-bar").removeAttribute("value");
      if (progress?.total) Object.assign($("draw-bar"), { max: progress.total, value: progress.step });
      await new Promise((done) => setTimeout(done, 500));
      sample = await read(`/v1/samples/${sample.id}`, { signal: here.stop.signal });
    }
    if (sample.state === "failed") throw new Error(sample.error.message);
    $("drawn").prepend(...sample.images.map(drawn));
  }).finally(() => show("draw-bar", false));
});

function drawn(image, i) {
  const name = `${image.prompt.replaceAll(/[^a-z0-9]+/gi, "-").slice(0, 60)}-${image.seed}.${image.content_type.split("/")[1]}`;
  const item = picture(image.url, image.prompt, `seed ${image.seed}`);
  item.append(" ", element("a", { href: image.url, download: name, textContent: "Download" }));
  return item;
}

// --- The list of trainings, and routing

async function list() {
  try {
    const { data } = await read("/v1/jobs?limit=12");
    $("jobs").replaceChildren(
      ...data.map((job) => {
        const when = element("time", { className: "soft", dateTime: job.created_at, textContent: time(job.created_at) });
        const about = element("span", { className: "soft", textContent: `${words(job.options.method)}, ${job.state}` });
        return element("li", {}, element("a", { href: `#job=${job.id}` }, element("b", { textContent: job.class_name }), about, when));
      }),
    );
    show("recent", data.length > 0);
    show("key", false);
  } catch (error) {
    if (!(error instanceof ApiError)) note("new-note", error.message);
  }
}

function route() {
  const id = location.hash.match(/^#job=([0-9a-f-]{36})$/)?.[1];
  show("new", !id);
  if (!id) loadModels();
  if (id) follow(id);
  else {
    open?.stop.abort();
    open = null;
    ["job", "draw"].forEach((name) => show(name, false));
  }
  list();
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key-text").value.trim());
  route();
});

// --- Models

let models = [];

async function loadModels() {
  try {
    models = (await read("/v1/models")).data.filter(({ workers, default: chosen }) => workers.length || chosen);
  } catch (error) {
    return; // without a key, or while the server is away: the form works without
  }
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((model) => element("option", { value: model.name, textContent: model.name, selected: model.default })));
  if (models.some(({ name }) => name === chosen)) $("model").value = chosen;
  show("model-field", models.length > 1);
  paintDefaults();
}

/** What the server takes for options that are left out. */
function paintDefaults() {
  const model = models.find(({ name }) => name === $("model").value);
  const found = model?.methods.find(({ method }) => method === $("method").value);
  if (!found) return ($("defaults").textContent = "");
  const { steps, learning_rate, class_images } = found.options;
  const lacks = found.usable ? "" : ` This model lacks what this method needs: ${found.lacks.map(words).join(", ")}.`;
  $("defaults").textContent = `Left out: ${steps} steps, learning rate ${learning_rate}, ${class_images} class images.${lacks}`;
}

for (const id of ["model", "method"]) $(id).addEventListener("change", paintDefaults);

function begin() {
  window.addEventListener("hashchange", route);
  route();
}

begin();
