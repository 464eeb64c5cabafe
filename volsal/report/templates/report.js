'use strict';
// Text from files only ever becomes textContent, never markup.

const $ = (selector, root = document) => root.querySelector(selector);
const json = (selector, root) => JSON.parse($(selector, root).textContent);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const number = (value, digits = 4) => {
  const text = value === 0 ? '0' : String(+value.toPrecision(digits));
  return text.replace('-', '−');
};
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(?=.*[1-9])/, '−').replace(/^-/, '');

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------------------------------------- viewer

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64.trim()), character => character.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(plain).arrayBuffer());
}

const PRESETS = {
  'CT brain': [40, 80], 'CT subdural': [75, 215], 'CT stroke': [35, 40], 'CT soft tissue': [40, 400],
  'CT liver': [60, 160], 'CT lung': [-600, 1500], 'CT bone': [480, 2500],
};
const INK = { cross: '#7fd4ff', mask: '#35f2a0' };

// How far a shown value may be from the file's: half the way to the neighbouring level.
function doubt(layer, code) {
  if (layer.exact) return 0;
  const levels = layer.levels, gap = other => other in levels ? Math.abs(levels[other] - levels[code]) / 2 : 0;
  return Math.max(gap(code - 1), gap(code + 1));
}

// The value at a code with its doubt; both to the digits that the doubt leaves.
function told(layer, code) {
  const value = layer.levels[code], off = doubt(layer, code);
  if (!off) return number(value, 7);
  const digits = clamp(Math.ceil(Math.log10(Math.max(Math.abs(value), off) / off)) + 2, 2, 9);
  return `${number(value, digits)} ± ${number(off * 1.01, 2)}`;
}

class Viewer {
  constructor(root) {
    this.root = root;
    this.geometry = json('.geometry', root);
    const texts = root.querySelectorAll('.volume');
    this.layers = this.geometry.layers.map((layer, place) => ({ ...layer, text: texts[place] }));
    this.scan = this.layers.find(layer => layer.kind === 'scan');
    this.maps = this.layers.filter(layer => layer.kind === 'map');
    this.masks = this.layers.filter(layer => layer.kind === 'mask');
    this.point = this.geometry.start.slice();
    this.step = [1, this.geometry.shape[0], this.geometry.shape[0] * this.geometry.shape[1]];
    this.field = name => $(`[name=${name}]`, root);
  }

  async open() {
    if (this.scan) this.scan.codes = await unpack(this.scan.text.textContent);
    for (const mask of this.masks) mask.codes = await unpack(mask.text.textContent);
    this.build();
    await this.choose(Math.max(0, this.maps.findIndex(map => !map.verdict)));
    new ResizeObserver(() => this.draw()).observe($('.screen', this.root));
  }

  async choose(place) {
    delete this.root.dataset.ready;
    const map = this.maps[place];
    if (map && !map.codes) map.codes = await unpack(map.text.textContent);
    this.map = map;
    if (map) {
      this.field('map').selectedIndex = place;
      this.field('threshold').value = 0;
    }
    this.field('peak').disabled = !map?.peak;
    this.draw();
  }

  // ------------------------------------------------------------------ the page's controls

  build() {
    const row = $('.planes', this.root);
    this.panels = this.geometry.planes.map(plane => {
      const canvas = element('canvas', { tabIndex: 0 });
      canvas.setAttribute('role', 'application');
      canvas.setAttribute('aria-roledescription', 'plane of a scan');
      row.append(element('figure', {}, canvas, element('figcaption')));
      const panel = { plane, canvas, caption: canvas.nextSibling, scan: new OffscreenCanvas(1, 1), map: new OffscreenCanvas(1, 1) };
      this.listen(panel);
      return panel;
    });
    for (const map of this.maps) this.field('map').append(element('option', { textContent: map.name }));
    for (const name of Object.keys(this.geometry.conventions)) {
      this.field('convention').append(element('option', { value: name, textContent: name }));
    }
    if (this.scan) this.buildWindow();
    this.field('map').onchange = event => this.choose(event.target.selectedIndex);
    for (const name of ['threshold', 'opacity', 'convention', 'cross', 'smooth', 'masks']) {
      this.field(name)?.addEventListener('input', () => this.draw());
    }
    this.field('peak').onclick = () => this.goToPeak();
  }

  buildWindow() {
    const [low, high] = this.scan.window, levels = this.scan.levels;
    const bottom = levels[0], top = levels[levels.length - 1];
    this.presets = { automatic: [(low + high) / 2, high - low], 'full range': [(bottom + top) / 2, top - bottom || 1], ...PRESETS };
    for (const name of [...Object.keys(this.presets), 'own']) {
      this.field('preset').append(element('option', { value: name, textContent: name }));
    }
    const reach = Math.max(top - bottom, high - low);
    Object.assign(this.field('level'), { min: Math.min(bottom, low), max: Math.max(top, high) });
    Object.assign(this.field('width'), { min: reach / 500, max: 1.5 * reach });
    const set = ([level, width]) => {
      this.window = { level, width };
      this.field('level').value = level;
      this.field('width').value = width;
    };
    set(this.presets.automatic);
    this.field('preset').onchange = event => {
      if (event.target.value in this.presets) set(this.presets[event.target.value]);
      this.draw();
    };
    for (const name of ['level', 'width']) {
      this.field(name).addEventListener('input', event => {
        this.window[name] = +event.target.value;
        this.field('preset').value = 'own';
        this.draw();
      });
    }
  }

  listen(panel) {
    const { canvas, plane } = panel, { across, up, through } = plane;
    const move = event => {
      const box = canvas.getBoundingClientRect(), at = panel.place;
      const x = ((event.clientX - box.left) / box.width * canvas.width - at.left) / at.width;
      const y = ((event.clientY - box.top) / box.height * canvas.height - at.top) / at.height;
      const count = this.geometry.shape, column = Math.floor(x * count[across]), row = Math.floor(y * count[up]);
      this.go(across, this.mirrored ? count[across] - 1 - column : column, up, count[up] - 1 - row);
    };
    canvas.addEventListener('pointerdown', event => {
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      move(event);
    });
    canvas.addEventListener('pointermove', event => event.buttons & 1 && move(event));
    canvas.addEventListener('wheel', event => {
      event.preventDefault();
      this.go(through, this.point[through] - Math.sign(event.deltaY));
    }, { passive: false });
    canvas.addEventListener('keydown', event => {
      const side = this.mirrored ? -1 : 1;
      const moves = {
        ArrowLeft: [across, -side], ArrowRight: [across, side], ArrowUp: [up, 1], ArrowDown: [up, -1],
        PageUp: [through, 1], PageDown: [through, -1],
      };
      if (event.key === 'Home') this.goToPeak();
      else if (event.key in moves) this.go(moves[event.key][0], this.point[moves[event.key][0]] + moves[event.key][1]);
      else return;
      event.preventDefault();
    });
  }

  goToPeak() {
    if (this.map?.peak) this.point = this.map.peak.slice();
    this.draw();
  }

  go(...pairs) {
    for (let n = 0; n < pairs.length; n += 2) this.point[pairs[n]] = clamp(pairs[n + 1], 0, this.geometry.shape[pairs[n]] - 1);
    this.draw();
  }

  get convention() { return this.geometry.conventions[this.field('convention').value]; }
  get mirrored() { return this.convention.mirrored; }
  get index() { return this.point.reduce((sum, at, axis) => sum + at * this.step[axis], 0); }

  // ------------------------------------------------------------------ drawing

  // Redraws once a frame, however many events ask for it.
  draw() {
    delete this.root.dataset.ready;
    this.asked ??= requestAnimationFrame(() => {
      this.asked = null;
      this.paint();
    });
  }

  paint() {
    const greys = this.scan && this.greys(), inks = this.map && this.inks();
    this.measure();
    for (const panel of this.panels) {
      this.fill(panel, greys, inks);
      this.compose(panel);
    }
    this.tell();
    this.paintBar();
    this.root.dataset.ready = 'yes';
  }

  greys() {
    const { level, width } = this.window, table = new Uint32Array(256);
    this.scan.levels.forEach((value, code) => {
      const grey = Math.round(clamp((value - level) / width + 0.5, 0, 1) * 255);
      table[code] = 0xff000000 | grey << 16 | grey << 8 | grey;
    });
    return table;
  }

  get threshold() { return +this.field('threshold').value * this.map.window[1]; }

  // Red, green, blue, opacity of a value of the map, 0 to 255.
  ink(value) {
    const { window: [low, high], signed } = this.map, points = this.geometry.colours[signed ? 'signed' : 'plain'];
    const place = clamp((value - low) / (high - low), 0, 1) * (points.length - 1), from = Math.min(Math.floor(place), points.length - 2);
    const colour = points[from].map((part, channel) => 255 * (part + (place - from) * (points[from + 1][channel] - part)));
    const hidden = (signed ? Math.abs(value) : value) < this.threshold;
    colour[3] = hidden ? 0 : colour[3] * +this.field('opacity').value;
    return colour.map(Math.round);
  }

  inks() {
    const table = new Uint32Array(256);
    this.map.levels.forEach((value, code) => {
      const [red, green, blue, opacity] = this.ink(value);
      table[code] = (opacity << 24 | blue << 16 | green << 8 | red) >>> 0;
    });
    return table;
  }

  // One scale for all planes, as large as the room allows.
  measure() {
    const { shape, spacing, planes } = this.geometry, ratio = devicePixelRatio || 1, least = 110, gap = 6;
    const room = Math.max(200, $('.planes', this.root).clientWidth - gap * (planes.length - 1));
    const size = axis => shape[axis] * spacing[axis];
    const wide = planes.map(plane => size(plane.across)), tall = Math.max(...planes.map(plane => size(plane.up)));
    const most = Math.max(240, innerHeight * 0.62);
    let scale = Math.min(room / wide.reduce((a, b) => a + b), most / tall);
    const narrow = wide.filter(mm => mm * scale < least);
    if (narrow.length) scale = Math.min(most / tall, (room - least * narrow.length) / wide.filter(mm => !narrow.includes(mm)).reduce((a, b) => a + b, 1e-9));
    const height = Math.max(least, tall * scale);
    this.panels.forEach((panel, n) => {
      const width = Math.max(least, wide[n] * scale), { canvas, plane } = panel;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.parentElement.style.flexBasis = `${width}px`;
      canvas.parentElement.style.flexGrow = 0;
      const w = wide[n] * scale * ratio, h = size(plane.up) * scale * ratio;
      panel.place = { left: (canvas.width - w) / 2, top: (canvas.height - h) / 2, width: w, height: h, scale: scale * ratio, ratio };
    });
  }

  fill(panel, greys, inks) {
    const { across, up, through } = panel.plane, { shape } = this.geometry, [w, h] = [shape[across], shape[up]];
    const base = this.point[through] * this.step[through];
    const [side, first] = this.mirrored ? [-this.step[across], (w - 1) * this.step[across]] : [this.step[across], 0];
    const paint = (target, codes, table) => {
      const picture = new ImageData(w, h), pixels = new Uint32Array(picture.data.buffer);
      for (let y = 0, n = 0; y < h; y++) {
        let at = base + first + (h - 1 - y) * this.step[up];
        for (let x = 0; x < w; x++, at += side) pixels[n++] = table[codes[at]];
      }
      target.width = w;
      target.height = h;
      target.getContext('2d').putImageData(picture, 0, 0);
    };
    if (greys) paint(panel.scan, this.scan.codes, greys);
    if (inks) paint(panel.map, this.map.codes, inks);
  }

  compose(panel) {
    const { canvas, plane, place } = panel, context = canvas.getContext('2d');
    context.fillStyle = '#000';
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = this.field('smooth').checked;
    context.imageSmoothingQuality = 'high';
    for (const picture of [this.scan && panel.scan, this.map && panel.map]) {
      if (picture) context.drawImage(picture, place.left, place.top, place.width, place.height);
    }
    if (this.field('masks')?.checked) this.masks.forEach(mask => this.outline(context, panel, mask));
    if (this.field('cross').checked) this.cross(context, panel);
    this.letter(context, panel);
    this.scaleBar(context, panel);
    const { through } = plane, count = this.geometry.shape[through], oblique = this.geometry.tilt ? ", scan's own" : '';
    panel.caption.textContent = `${plane.name}${oblique}, slice ${this.point[through] + 1} of ${count}`;
    canvas.setAttribute('aria-label', `${panel.caption.textContent}; crosshair at ${this.world().map(mm => fixed(mm, 1)).join(', ')} mm; map ${this.mapWords()}`);
  }

  // Where the crosshair's voxel has its centre, in pixels of the canvas.
  centre({ plane, place }) {
    const { shape } = this.geometry, { across, up } = plane;
    const column = this.mirrored ? shape[across] - 1 - this.point[across] : this.point[across];
    return [place.left + (column + 0.5) / shape[across] * place.width, place.top + (shape[up] - this.point[up] - 0.5) / shape[up] * place.height];
  }

  cross(context, panel) {
    const [x, y] = this.centre(panel), { left, top, width, height, ratio } = panel.place, free = 9 * ratio;
    context.strokeStyle = INK.cross;
    context.globalAlpha = 0.8;
    context.lineWidth = ratio;
    context.beginPath();
    for (const [from, to] of [[left, x - free], [x + free, left + width]]) if (to > from) { context.moveTo(from, y); context.lineTo(to, y); }
    for (const [from, to] of [[top, y - free], [y + free, top + height]]) if (to > from) { context.moveTo(x, from); context.lineTo(x, to); }
    context.stroke();
    context.globalAlpha = 1;
  }

  // The edges between voxels of the mask and others.
  outline(context, { plane, place }, mask) {
    const { across, up, through } = plane, { shape } = this.geometry, [w, h] = [shape[across], shape[up]];
    const base = this.point[through] * this.step[through], inside = (x, y) => {
      if (x < 0 || y < 0 || x >= w || y >= h) return 0;
      return mask.levels[mask.codes[base + (this.mirrored ? w - 1 - x : x) * this.step[across] + (h - 1 - y) * this.step[up]]];
    };
    const px = x => place.left + x / w * place.width, py = y => place.top + y / h * place.height;
    context.strokeStyle = INK.mask;
    context.lineWidth = 1.5 * place.ratio;
    context.beginPath();
    for (let y = 0; y <= h; y++) {
      for (let x = 0; x <= w; x++) {
        const here = inside(x, y);
        if (here !== inside(x - 1, y)) { context.moveTo(px(x), py(y)); context.lineTo(px(x), py(y + 1)); }
        if (here !== inside(x, y - 1)) { context.moveTo(px(x), py(y)); context.lineTo(px(x + 1), py(y)); }
      }
    }
    context.stroke();
  }

  words(context, text, x, y, ratio, size = 14, align = 'center') {
    Object.assign(context, { font: `600 ${size * ratio}px system-ui, sans-serif`, textAlign: align, textBaseline: 'middle', lineJoin: 'round', lineWidth: 3 * ratio, strokeStyle: '#000', fillStyle: '#fff' });
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }

  letter(context, { canvas, plane, place: { ratio } }) {
    const edges = this.convention.letters[plane.name], { width, height } = canvas, in_ = 12 * ratio;
    this.words(context, edges.left, in_, height / 2, ratio);
    this.words(context, edges.right, width - in_, height / 2, ratio);
    this.words(context, edges.top, width / 2, in_, ratio);
    this.words(context, edges.bottom, width / 2, height - in_, ratio);
  }

  scaleBar(context, { canvas, place: { scale, ratio } }) {
    const room = 0.36 * canvas.width / scale, mm = [200, 100, 50, 20, 10, 5, 2, 1].find(length => length <= room) ?? room;
    const x = 10 * ratio, y = canvas.height - 12 * ratio;
    for (const [width, colour] of [[4, '#000'], [2, '#fff']]) {
      Object.assign(context, { lineWidth: width * ratio, strokeStyle: colour });
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(x + mm * scale, y);
      context.stroke();
    }
    this.words(context, `${mm} mm`, x, y - 10 * ratio, ratio, 11, 'left');
  }

  paintBar() {
    const bar = $('.bar', this.root);
    bar.hidden = !this.map;
    if (!this.map) return;
    const { window: [low, high], unit } = this.map, canvas = $('canvas', bar), context = canvas.getContext('2d');
    canvas.width = 1;
    canvas.height = 256;
    for (let y = 0; y < 256; y++) {
      const [red, green, blue, opacity] = this.ink(high - y / 255 * (high - low));
      context.fillStyle = `rgb(${[red, green, blue].map(part => part * opacity / 255).join(' ')})`;
      context.fillRect(0, y, 1, 1);
    }
    $('.high', bar).textContent = number(high, 3);
    $('.low', bar).textContent = number(low, 3);
    $('.unit', bar).textContent = unit;
    bar.setAttribute('aria-label', `colour scale from ${number(low, 3)} to ${number(high, 3)} ${unit}`);
    $('output.threshold', this.root).textContent = `${number(this.threshold, 3)} ${unit}`;
  }

  // ------------------------------------------------------------------ words

  world() { return this.geometry.affine.map(row => row[0] * this.point[0] + row[1] * this.point[1] + row[2] * this.point[2] + row[3]); }

  mapWords() { return this.map ? `${told(this.map, this.map.codes[this.index])} ${this.map.unit}` : 'none'; }

  tell() {
    const say = (name, text) => { $(name, this.root).textContent = text; };
    say('.world', this.world().map((mm, axis) => `${'xyz'[axis]} ${fixed(mm, 1)}`).join('   '));
    say('.voxel', this.geometry.toFile.map(row => row[0] * this.point[0] + row[1] * this.point[1] + row[2] * this.point[2] + row[3]).join(', '));
    say('.value', this.mapWords());
    say('.verdict', this.map?.verdict ?? '');
    say('.name', this.map?.name ?? 'map');
    const { words } = this.convention, hides = this.map && this.threshold > 0;
    say('.words', `${words[0].toUpperCase()}${words.slice(1)}. ${hides ? `Below ${number(this.threshold, 3)} the map is hidden. ` : ''}`);
    say('.tilt', this.geometry.tilt ? `The ${this.geometry.tilt}; positions are the scanner's. ` : '');
    if (!this.scan) return;
    say('.readout .scan', told(this.scan, this.scan.codes[this.index]));
    say('output.level', number(this.window.level, 3));
    say('output.width', number(this.window.width, 3));
  }
}

// A viewer takes memory and time, so it opens when it is looked at.
const watcher = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    new Viewer(target).open().catch(error => { $('.verdict', target).textContent = `This browser cannot open the volumes: ${error.message}`; });
  }
});
document.querySelectorAll('.viewer').forEach(root => watcher.observe(root));

// ---------------------------------------------------------------------------------------------- list of cases

const AT_ONCE = 60;

class Listing {
  constructor(root) {
    this.root = root;
    Object.assign(this, json('.content', root));
    this.count = this.links.length;
    this.field = name => $(`[name=${name}]`, root);
    this.texts = this.links.map((_, row) => this.columns.filter(column => column.kind !== 'number').map(column => column.values[row] ?? '').join('\n').toLowerCase());
    this.order = this.columns[this.order];
    this.down = this.order.kind === 'number';
    this.visible = AT_ONCE;
    this.build();
    this.rows = this.links.map(() => null);
    this.cards = this.links.map(() => null);
    this.turnMap();
  }

  build() {
    for (const column of this.columns.filter(column => column.kind === 'choice' && !column.map)) {
      const values = [...new Set(column.values.filter(value => value !== null && value !== ''))].sort(compare);
      if (values.length < 2) continue;
      const choice = element('select', {}, element('option', { value: '', textContent: 'any' }), ...values.map(value => element('option', { value, textContent: value })));
      choice.onchange = () => this.update();
      column.choice = choice;
      $('.choices', this.root).append(element('label', {}, `${column.label} `, choice));
    }
    this.field('text').oninput = () => this.update();
    this.field('map')?.addEventListener('change', () => this.turnMap());
    this.field('scale')?.addEventListener('change', () => this.turnMap());
    this.field('order').onchange = event => this.orderBy(this.shown[event.target.selectedIndex], this.down);
    this.field('down').onchange = event => this.orderBy(this.order, event.target.checked);
    $('form', this.root).onsubmit = event => event.preventDefault();
    $('.more', this.root)?.addEventListener('click', () => { this.visible += AT_ONCE; this.update(false); });
  }

  // Another map's columns in the table.
  turnMap() {
    const map = this.field('map')?.value ?? Object.keys(this.pictures)[0];
    const pictured = this.pictures[map], scale = this.field('scale')?.value;
    this.pictured = pictured ? { ...pictured, same: scale === 'same', links: pictured.links[scale] } : { links: [] };
    if (map) {
      $('.hint .map', this.root).textContent = map;
      $('.scale-words', this.root).replaceChildren(...this.scaleWords());
    }
    this.shown = this.columns.filter(column => !column.map || column.map === map);
    this.order = this.shown.find(column => column.label === this.order.label) ?? this.shown[0];
    const heads = this.shown.map(column => {
      const button = element('button', { type: 'button', textContent: column.label });
      button.onclick = () => this.orderBy(column, this.order === column ? !this.down : column.kind === 'number');
      column.head = element('th', { scope: 'col', className: column.kind === 'number' ? 'n' : '' }, button);
      return column.head;
    });
    $('thead tr', this.root).replaceChildren(...heads);
    this.field('order').replaceChildren(...this.shown.map(column => element('option', { textContent: column.label })));
    this.rows.fill(null);
    this.cards.fill(null);
    this.update();
  }

  orderBy(column, down) {
    this.order = column;
    this.down = down;
    this.update();
  }

  update(fromTop = true) {
    if (fromTop) this.visible = AT_ONCE;
    const words = this.field('text').value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = this.columns.filter(column => column.choice?.value);
    const kept = [...this.links.keys()].filter(row => words.every(word => this.texts[row].includes(word)) && chosen.every(column => column.values[row] === column.choice.value));
    const { values } = this.order, sign = this.down ? -1 : 1;
    const without = value => value === null || value === '';  // always last
    kept.sort((a, b) => without(values[a]) - without(values[b]) || sign * compare(values[a], values[b]) || a - b);
    for (const column of this.shown) column.head.setAttribute('aria-sort', column !== this.order ? 'none' : this.down ? 'descending' : 'ascending');
    this.field('order').selectedIndex = this.shown.indexOf(this.order);
    this.field('down').checked = this.down;
    $('.found', this.root).textContent = kept.length === this.count ? `${this.count} cases` : `${kept.length} of ${this.count} cases`;
    $('tbody', this.root).replaceChildren(...kept.map(row => this.rows[row] ??= this.row(row)));
    const pictured = kept.filter(row => this.pictured.links[row]);
    $('.gallery', this.root)?.replaceChildren(...pictured.slice(0, this.visible).map(row => this.cards[row] ??= this.card(row)));
    const more = $('.more', this.root);
    if (more) more.hidden = pictured.length <= this.visible;
  }

  row(row) {
    return element('tr', {}, ...this.shown.map((column, place) => {
      const value = column.values[row], text = value === null ? '' : typeof value === 'number' ? number(value) : value;
      if (!place) return element('th', { scope: 'row' }, this.link(row, element('bdi', { textContent: text })));
      if (column.label === 'status' || column.label === 'map') return element('td', {}, element('span', { className: `state ${value ?? ''}`, textContent: text }));
      return element('td', { className: column.kind === 'number' ? 'n' : '' }, element('bdi', { textContent: text }));
    }));
  }

  link(row, ...children) {
    return this.links[row] ? element('a', { href: this.links[row] }, ...children) : element('span', {}, ...children);
  }

  // What may be read from the colours.
  scaleWords() {
    const { same, shared } = this.pictured;
    return same
      ? ['One colour scale for all cases: the same colour is the same value. ', this.bar(shared)]
      : ['Each picture has a colour scale of its own, so that a weak map looks as strong as any other.'];
  }

  bar([low, high]) {
    const { unit, signed } = this.pictured;
    const ramp = element('i', { className: signed ? 'ramp signed' : 'ramp' });
    return element('span', { className: 'scale' }, number(low, 2), ramp, `${number(high, 2)} ${unit}`);
  }

  card(row) {
    const of = label => this.shown.find(column => column.label === label)?.values[row];
    const id = this.columns[0].values[row], status = of('map'), said = of('prediction'), { unit, same, shared, windows, links } = this.pictured;
    const alt = `${id}: axial, coronal and sagittal plane through the ${status === 'ok' ? "map's peak" : 'middle of the scan'}`;
    const card = element('li', {}, this.link(row, element('img', { src: links[row], alt, decoding: 'async' }), element('b', {}, element('bdi', { textContent: id }))));
    if (said) card.append(element('span', { className: 'said' }, element('bdi', { textContent: said })));
    const own = windows[row], beyond = own[1] > shared[1] ? ', beyond the scale' : '';
    card.append(status === 'ok'
      ? same ? element('span', { className: 'scale', textContent: `up to ${number(own[1], 2)} ${unit}${beyond}` }) : this.bar(own)
      : element('span', { className: `state ${status}`, textContent: status === 'empty' ? 'no positive evidence' : 'the same everywhere' }));
    return card;
  }
}

const words = new Intl.Collator('en', { numeric: true });
function compare(a, b) {
  return typeof a === 'number' && typeof b === 'number' ? a - b : words.compare(a ?? '', b ?? '');
}

document.querySelectorAll('.listing').forEach(root => {
  try {
    new Listing(root);
    root.dataset.ready = 'yes';
  } catch (error) {
    $('.found', root).textContent = `This browser cannot list the cases: ${error.message}`;
  }
});
