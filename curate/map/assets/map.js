// Draws maps of images: points on a canvas, what lies under the pointer, colours, search, lasso, and lists to save.
"use strict";
(() => {
  const COLOURS = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#ff8ab7", "#6cc5b0", "#9c6b4e", "#38b2e6",
    "#c4407f", "#7f9c1f", "#8a8fd8", "#d9822b", "#1d8a77", "#b36ae2", "#5c7cfa", "#a3a02c", "#e0526f", "#5f8f9b", "#b98a5f"];
  const SCALE = ["#5b4fb3", "#3b74b5", "#1f9a8a", "#57b653", "#d0b81f"];
  const LISTED = 60, NAMED = 20, ROWS_IN_CONDITION = 200, NEAR_PX = 14;

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function numbers(packed) {
    const bytes = Uint8Array.from(atob(packed.bytes), (letter) => letter.charCodeAt(0));
    return new { f4: Float32Array, f8: Float64Array, i4: Int32Array }[packed.type](bytes.buffer);
  }

  const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  const pixel = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  const mixed = (one, other, share) => one.map((value, place) => Math.round(value + (other[place] - value) * share));
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

  function made(name, text, parent, attributes = {}) {
    const element = document.createElement(name);
    element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  function start(root, data) {
    const part = (name) => root.querySelector(`.map-${name}`);
    const canvas = root.querySelector("canvas"), context = canvas.getContext("2d", { alpha: false });
    part("keys").id = `map-keys-${[...document.querySelectorAll(".map")].indexOf(root)}`;
    canvas.setAttribute("aria-describedby", part("keys").id);
    const frame = part("frame"), tip = part("tip"), said = part("said");
    const xs = numbers(data.x), ys = numbers(data.y), rows = numbers(data.rows), total = xs.length;
    const columns = data.columns.map((column) => ({ ...column, values: numbers(column.values) }));
    const pictured = numbers(data.pictures.points), pictureOf = new Map(), images = new Map();
    pictured.forEach((point, place) => pictureOf.set(point, place));
    const uri = (point) => data.prefix + data.uris[point];
    const shown = new Uint8Array(total).fill(1), picked = new Uint8Array(total);
    const colours = new Uint32Array(total);
    const order = Uint32Array.from(xs, (_, place) => place); // drawn in random order, so that no group hides others
    for (let place = total - 1, state = 1; place > 0; place--) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      const other = state % (place + 1);
      [order[place], order[other]] = [order[other], order[place]];
    }

    let outline = null; // of the lasso that made the choice, in the map's own coordinates
    let paper, faint, ink, numPicked = 0, current = -1, hiddenSome = false, drawing = null, waiting = false;
    let width = 0, height = 0, ratio = 1, scale = 1, left = 0, top = 0, whole = 1;
    const across = (point) => xs[point] * scale + left, down = (point) => top - ys[point] * scale;

    // View -------------------------------------------------------------------------------------------------------

    function showWhole() {
      let [minX, maxX, minY, maxY] = [Infinity, -Infinity, Infinity, -Infinity];
      for (let point = 0; point < total; point++) {
        minX = Math.min(minX, xs[point]); maxX = Math.max(maxX, xs[point]);
        minY = Math.min(minY, ys[point]); maxY = Math.max(maxY, ys[point]);
      }
      const margin = 24;
      whole = scale = Math.min((width - 2 * margin) / (maxX - minX || 1), (height - 2 * margin) / (maxY - minY || 1));
      left = width / 2 - scale * (minX + maxX) / 2;
      top = height / 2 + scale * (minY + maxY) / 2;
      redraw();
    }

    function zoom(factor, x = width / 2, y = height / 2) {
      const next = Math.min(Math.max(scale * factor, whole / 2), whole * 2000);
      left = x - (x - left) * next / scale;
      top = y + (top - y) * next / scale;
      scale = next;
      redraw();
    }

    function resize() {
      const box = frame.getBoundingClientRect(), isFirst = !width;
      const [oldWidth, oldHeight] = [width, height];
      [width, height, ratio] = [Math.round(frame.clientWidth), Math.round(frame.clientHeight), Math.min(devicePixelRatio || 1, 2)];
      if (!box.width) return;
      canvas.width = width * ratio; canvas.height = height * ratio;
      if (isFirst) return showWhole();
      left += (width - oldWidth) / 2; top += (height - oldHeight) / 2;
      redraw();
    }

    // Drawing ----------------------------------------------------------------------------------------------------

    function redraw() {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(); });
    }

    function disc(radius) { // places of its pixels from the middle one
      const places = [];
      for (let y = -radius; y <= radius; y++) {
        for (let x = -radius; x <= radius; x++) if (x * x + y * y <= (radius + 0.4) ** 2) places.push(y * canvas.width + x);
      }
      return Int32Array.from(places);
    }

    function draw() {
      if (!width || !paper) return;
      const image = context.createImageData(canvas.width, canvas.height);
      const pixels = new Uint32Array(image.data.buffer), columnsPx = canvas.width, rowsPx = canvas.height;
      pixels.fill(pixel(paper));
      const usual = total > 50000 ? 0.9 : total > 10000 ? 1.3 : total > 1500 ? 2 : 3.5;
      const radius = Math.max(1, Math.round(ratio * Math.min(usual * (scale / whole) ** 0.4, 7)));
      const isChoice = numPicked > 0;
      const passes = hiddenSome || isChoice ? [false, true] : [true];
      for (const isFront of passes) {
        const reach = isFront && isChoice ? radius + 1 : radius, places = disc(reach);
        for (let place = 0; place < total; place++) {
          const point = order[place];
          if (passes.length > 1 && (shown[point] && (!isChoice || picked[point]) ? true : false) !== isFront) continue;
          const x = ((xs[point] * scale + left) * ratio) | 0, y = ((top - ys[point] * scale) * ratio) | 0;
          if (x < reach || y < reach || x >= columnsPx - reach || y >= rowsPx - reach) continue;
          const colour = isFront ? colours[point] : faint;
          const middle = y * columnsPx + x;
          for (let each = 0; each < places.length; each++) pixels[middle + places[each]] = colour;
        }
      }
      context.putImageData(image, 0, 0);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      if (part("pictures").checked) drawPictures();
      if (current >= 0) ring(current);
      if (drawing) {
        context.beginPath();
        drawing.forEach(([x, y]) => context.lineTo(x, y));
        context.closePath();
        context.strokeStyle = ink; context.lineWidth = 1.5; context.setLineDash([5, 4]); context.stroke(); context.setLineDash([]);
      }
      context.setTransform(1, 0, 0, 1, 0, 0);
    }

    function ring(point) {
      context.beginPath();
      context.arc(across(point), down(point), 9, 0, 7);
      context.strokeStyle = ink; context.lineWidth = 2.5; context.stroke();
    }

    function picture(point) {
      const place = pictureOf.get(point);
      if (place === undefined) return null;
      if (!images.has(point)) {
        const image = new Image();
        image.onload = redraw;
        image.src = `data:image/webp;base64,${data.pictures.sources[place]}`;
        images.set(point, image);
      }
      return images.get(point);
    }

    function drawPictures() { // none over another; the first stored come first, at most one in each cell of a fixed grid
      const side = width < 600 ? 34 : 44, cell = 2 ** Math.ceil(Math.log2(1.8 * side / scale)), taken = new Map();
      context.lineWidth = 2;
      for (const point of pictured) {
        const x = across(point), y = down(point);
        if (x < 0 || y < 0 || x > width || y > height || !shown[point] || (numPicked && !picked[point])) continue;
        const column = Math.floor(xs[point] / cell), row = Math.floor(ys[point] / cell);
        let isFree = true;
        for (let near = 0; near < 9 && isFree; near++) {
          const other = taken.get(`${column + near % 3 - 1} ${row + Math.floor(near / 3) - 1}`);
          isFree = !other || (near !== 4 && Math.max(Math.abs(other[0] - x), Math.abs(other[1] - y)) > side + 6);
        }
        if (!isFree) continue;
        taken.set(`${column} ${row}`, [x, y]);
        const image = picture(point);
        if (!image.complete || !image.naturalWidth) continue;
        const fit = side / Math.max(image.naturalWidth, image.naturalHeight);
        const [w, h] = [image.naturalWidth * fit, image.naturalHeight * fit];
        const [r, g, b] = [colours[point] & 255, colours[point] >> 8 & 255, colours[point] >> 16 & 255];
        context.imageSmoothingEnabled = fit < 1;
        context.drawImage(image, x - w / 2, y - h / 2, w, h);
        context.strokeStyle = `rgb(${r} ${g} ${b})`;
        context.strokeRect(x - w / 2, y - h / 2, w, h);
      }
    }

    // Colours and legend -----------------------------------------------------------------------------------------

    function colour() {
      const style = getComputedStyle(document.documentElement);
      paper = rgb(style.getPropertyValue("--paper").trim());
      ink = style.getPropertyValue("--ink").trim();
      faint = pixel(mixed(paper, rgb(ink), 0.12));
      const column = columns[part("colour").value], legend = part("legend");
      legend.replaceChildren();
      shown.fill(1);
      hiddenSome = false;
      if (!column) colours.fill(pixel(rgb(COLOURS[0])));
      else if (column.names) categories(column, legend);
      else continuous(column, legend);
      redraw();
    }

    function categories(column, legend) { // codes are ranks: 0 is the most frequent value
      const codes = column.values, none = pixel(mixed(paper, rgb(ink), 0.35));
      const palette = column.names.map((_, code) => pixel(rgb(COLOURS[code % COLOURS.length])));
      for (let point = 0; point < total; point++) colours[point] = codes[point] < 0 ? none : palette[codes[point]];
      const counts = new Uint32Array(column.names.length + 1);
      for (const code of codes) counts[code < 0 ? column.names.length : code]++;
      const entries = column.names.slice(0, NAMED).map((name, code) => [name, [code], counts[code], COLOURS[code]]);
      const others = column.names.map((_, code) => code).slice(NAMED);
      if (others.length) entries.push([`${others.length.toLocaleString("en")} more`, others, others.reduce((sum, code) => sum + counts[code], 0), ""]);
      if (counts[column.names.length]) entries.push(["none", [-1], counts[column.names.length], ""]);
      const on = new Set(entries.keys());
      const buttons = entries.map(([name, , number, swatch], entry) => {
        const button = made("button", "", legend, { type: "button", "aria-pressed": "true" });
        if (swatch) made("i", "", button).style.background = swatch;
        made("span", name, button);
        made("small", number.toLocaleString("en"), button);
        button.onclick = () => {
          if (on.size === entries.length) on.clear();
          on.has(entry) ? on.delete(entry) : on.add(entry);
          if (!on.size) entries.forEach((_, each) => on.add(each));
          const wanted = new Set([...on].flatMap((each) => entries[each][1]));
          let left = 0;
          for (let point = 0; point < total; point++) left += shown[point] = wanted.has(codes[point]) ? 1 : 0;
          hiddenSome = left < total;
          buttons.forEach((each, place) => each.setAttribute("aria-pressed", String(on.has(place))));
          say(`${count(left, "image")} shown`);
          redraw();
        };
        return button;
      });
    }

    function continuous(column, legend) { // from the 1st to the 99th hundredth
      const sorted = column.values.filter((value) => !Number.isNaN(value)).sort();
      const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
      const low = at(0.01), high = at(0.99), stops = SCALE.map(rgb), steps = new Uint32Array(256);
      for (let step = 0; step < 256; step++) {
        const place = step / 255 * (stops.length - 1), base = Math.min(Math.floor(place), stops.length - 2);
        steps[step] = pixel(mixed(stops[base], stops[base + 1], place - base));
      }
      const none = pixel(mixed(paper, rgb(ink), 0.35));
      for (let point = 0; point < total; point++) {
        const value = column.values[point], share = (value - low) / (high - low || 1);
        colours[point] = Number.isNaN(value) ? none : steps[Math.max(0, Math.min(255, Math.round(share * 255)))];
      }
      made("span", written(low), legend);
      made("span", "", legend, { class: "map-scale" }).style.background = `linear-gradient(90deg, ${SCALE.join(", ")})`;
      made("span", written(high), legend);
    }

    const written = (value) => Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

    function cell(column, point) {
      const value = column.values[point];
      if (column.names) return value < 0 ? "–" : column.names[value];
      return Number.isNaN(value) ? "–" : written(value);
    }

    // What lies under the pointer --------------------------------------------------------------------------------

    function nearest(x, y, within, accepts = () => true) {
      let best = -1, least = within * within;
      for (let point = 0; point < total; point++) {
        if (!shown[point]) continue;
        const distance = (across(point) - x) ** 2 + (down(point) - y) ** 2;
        if (distance < least && accepts(point)) { best = point; least = distance; }
      }
      return best;
    }

    function nearestPictured(found) {
      let best = -1, least = NEAR_PX ** 2 * 4 / scale ** 2;
      for (const point of pictured) {
        const distance = (xs[point] - xs[found]) ** 2 + (ys[point] - ys[found]) ** 2;
        if (distance < least) { best = point; least = distance; }
      }
      return best;
    }

    const say = (words) => { said.textContent = words; };

    function point(found, isSaid = false) {
      if (found === current && !isSaid) return;
      current = found;
      tip.hidden = found < 0;
      if (found >= 0) {
        tip.replaceChildren();
        const beside = pictureOf.has(found) ? found : pictured.length ? nearestPictured(found) : -1;
        if (beside >= 0) {
          const image = made("img", "", tip, { src: picture(beside).src, alt: "" });
          image.onload = () => image.classList.toggle("pixels", image.naturalWidth <= 64);
          if (beside !== found) made("small", "Picture of an image beside it", tip);
        }
        made("div", uri(found), tip);
        const list = made("dl", "", tip);
        for (const column of columns) { made("dt", column.name, list); made("dd", cell(column, found), list); }
        made("dt", "row", list); made("dd", String(rows[found]), list);
        const [x, y] = [across(found), down(found)];
        tip.style.left = `${Math.max(4, x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16)}px`;
        tip.style.top = `${Math.max(4, Math.min(y + 12, height - tip.offsetHeight - 4))}px`;
        if (isSaid) say([...columns.map((column) => `${column.name} ${cell(column, found)}`), uri(found)].join(", ") + (picked[found] ? ", chosen" : ""));
      }
      redraw();
    }

    function goTo(found) {
      if (found < 0) return;
      const [x, y] = [across(found), down(found)];
      if (x < 20 || y < 20 || x > width - 20 || y > height - 20) { left += width / 2 - x; top += height / 2 - y; }
      point(found, true);
    }

    function step(dx, dy) {
      if (current < 0) return goTo(nearest(width / 2, height / 2, Infinity));
      const [x, y, from] = [across(current), down(current), current];
      goTo(nearest(x, y, Infinity, (other) => {
        const [right, below] = [across(other) - x, down(other) - y];
        const along = right * dx + below * dy, aside = Math.abs(right * dy) + Math.abs(below * dx);
        return other !== from && along > 0.5 && aside <= along;
      }));
    }

    // Choosing ---------------------------------------------------------------------------------------------------

    function choose(accepts, words, drawn = null) {
      outline = drawn;
      numPicked = 0;
      for (let each = 0; each < total; each++) numPicked += picked[each] = shown[each] && accepts(each) ? 1 : 0;
      chosen(words);
    }

    function chosen(words) {
      const all = allPicked(), list = part("list");
      const first = [...all.filter((each) => pictureOf.has(each)), ...all.filter((each) => !pictureOf.has(each))].slice(0, LISTED);
      part("picked").hidden = !numPicked;
      part("count").textContent = `${count(numPicked, "image")} chosen`;
      part("condition").hidden = !condition();
      list.replaceChildren();
      for (const each of first) {
        const button = made("button", "", made("li", "", list), { type: "button" });
        const image = picture(each);
        if (image) made("img", "", button, { src: image.src, alt: "", class: "pixels" });
        const label = columns.find((column) => column.name === "label");
        made("span", `${label ? `${cell(label, each)} ` : ""}${uri(each).split(/[/=]/).pop()}`, button);
        button.setAttribute("title", uri(each));
        button.onclick = () => goTo(each);
      }
      part("rest").textContent = numPicked > LISTED ? `These are ${LISTED} of them, those with a stored picture first.` : "";
      say(words || `${count(numPicked, "image")} chosen`);
      redraw();
    }

    function allPicked() {
      const all = [];
      for (let each = 0; each < total; each++) if (picked[each]) all.push(each);
      return all;
    }

    function inside(polygon, x, y) {
      let is = false;
      for (let place = 0, before = polygon.length - 1; place < polygon.length; before = place++) {
        const [x1, y1] = polygon[place], [x2, y2] = polygon[before];
        if (y1 > y !== y2 > y && x < (x2 - x1) * (y - y1) / (y2 - y1) + x1) is = !is;
      }
      return is;
    }

    function condition() { // for --where: few rows by number, else what lies within the lasso, also of images not drawn
      if (numPicked <= ROWS_IN_CONDITION && data.total === total) return `row in (${allPicked().map((each) => rows[each]).join(", ")})`;
      if (!outline || hiddenSome) return null;
      const short = (value) => String(Number(value.toPrecision(7)));
      const crossings = outline.map(([x1, y1], place) => {
        const [x2, y2] = outline[(place + 1) % outline.length];
        if (y1 === y2) return "0";
        return `((projection_y < ${short(y1)}) <> (projection_y < ${short(y2)}) and projection_x < ${short(x1)} + (projection_y - ${short(y1)}) * ${short((x2 - x1) / (y2 - y1))})::int`;
      });
      return `(${crossings.join(" + ")}) % 2 = 1`;
    }

    async function copy(text, what) {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const area = made("textarea", text, document.body);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      say(`${what} copied`);
    }

    const names = () => allPicked().map(uri).join("\n") + "\n";
    part("copy").onclick = () => copy(names(), count(numPicked, "name"));
    part("condition").onclick = () => copy(condition(), "Condition");
    part("clear").onclick = () => { part("search").value = ""; choose(() => false, "Nothing is chosen"); };
    part("save").onclick = () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([names()], { type: "text/plain" }));
      link.download = "picked.txt";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      say("picked.txt saved");
    };
    const file = root.dataset.name.replaceAll("'", "''");
    part("use").textContent = `dinov2 catalog sql "select * from '${file}' where uri in (from lines('picked.txt'))" -o picked.parquet`;

    let lowered = null;
    part("search").oninput = () => {
      const wanted = part("search").value.trim().toLowerCase();
      if (!wanted) return choose(() => false, " ");
      const label = columns.find((column) => column.name === "label" && column.names);
      lowered ??= data.uris.map((each) => each.toLowerCase());
      const labels = label ? label.names.map((name) => name.toLowerCase().includes(wanted)) : [];
      const isPrefix = data.prefix.toLowerCase().includes(wanted);
      choose((each) => isPrefix || lowered[each].includes(wanted) || (label && labels[label.values[each]]));
    };

    // Pointer and keys -------------------------------------------------------------------------------------------

    const pointers = new Map();
    let isLasso = false, gap = 0, moved = false;
    const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    function mode(lasso) {
      isLasso = lasso;
      frame.classList.toggle("lasso", lasso);
      part("lasso").setAttribute("aria-pressed", String(lasso));
      part("move").setAttribute("aria-pressed", String(!lasso));
    }
    part("lasso").onclick = () => mode(true);
    part("move").onclick = () => mode(false);
    part("in").onclick = () => zoom(1.6);
    part("out").onclick = () => zoom(1 / 1.6);
    part("whole").onclick = showWhole;
    part("pictures").onchange = redraw;

    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, at(event));
      moved = false;
      gap = 0;
      drawing = (isLasso || event.shiftKey) && pointers.size === 1 ? [at(event)] : null;
    };
    canvas.onpointermove = (event) => {
      const [x, y] = at(event), before = pointers.get(event.pointerId);
      if (!before) return point(nearest(x, y, NEAR_PX));
      if (Math.hypot(x - before[0], y - before[1]) > 3) moved = true;
      if (!moved && pointers.size === 1) return;
      point(-1);
      pointers.set(event.pointerId, [x, y]);
      if (pointers.size === 2) {
        const [one, other] = [...pointers.values()], now = Math.hypot(one[0] - other[0], one[1] - other[1]);
        if (gap) zoom(now / gap, (one[0] + other[0]) / 2, (one[1] + other[1]) / 2);
        gap = now;
      } else if (drawing) {
        drawing.push([x, y]);
      } else {
        left += x - before[0]; top += y - before[1];
      }
      redraw();
    };
    canvas.onpointerup = canvas.onpointercancel = (event) => {
      pointers.delete(event.pointerId);
      if (drawing && drawing.length > 2) {
        const step = Math.ceil(drawing.length / 60), corners = drawing.filter((_, place) => place % step === 0);
        const polygon = corners.map(([x, y]) => [(x - left) / scale, (top - y) / scale]);
        choose((each) => inside(polygon, xs[each], ys[each]), undefined, polygon);
      } else if (!moved && event.type === "pointerup") {
        point(nearest(...at(event), 2 * NEAR_PX), true);
      }
      drawing = null;
      redraw();
    };
    canvas.onpointerleave = (event) => { if (!pointers.size && event.pointerType === "mouse") point(-1); };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      point(-1);
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...at(event));
    }, { passive: false });
    canvas.onkeydown = (event) => {
      const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key in moves) step(...moves[event.key]);
      else if (event.key === "+" || event.key === "=") zoom(1.6);
      else if (event.key === "-") zoom(1 / 1.6);
      else if (event.key === "0") showWhole();
      else if (event.key === "Escape") part("clear").onclick();
      else if (event.key === "Enter" && current >= 0) {
        picked[current] ^= 1;
        numPicked += picked[current] ? 1 : -1;
        outline = null;
        chosen();
      } else return;
      event.preventDefault();
    };

    // Start ------------------------------------------------------------------------------------------------------

    columns.forEach((column, place) => made("option", column.name, part("colour"), { value: place }));
    made("option", "nothing", part("colour"), { value: -1 });
    part("colour").onchange = colour;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colour);
    new ResizeObserver(resize).observe(frame);
    resize();
    colour();
    say(`${count(total, "image")}${data.total > total ? ` of ${data.total.toLocaleString("en")}, drawn at random` : ""}`);
    root.place = (each) => { const box = canvas.getBoundingClientRect(); return [box.left + across(each), box.top + down(each)]; };
    root.dataset.ready = "yes";
  }

  for (const root of document.querySelectorAll(".map")) {
    unpacked(root.querySelector(".map-data").textContent).then((data) => start(root, data));
  }
})();
