document.documentElement.classList.add("js");

/* Pointing at an estimator in a legend fades the others in that case's figures. */
for (const item of document.querySelectorAll("[data-for]")) {
  const marks = item.closest(".case").querySelectorAll("[data-s]");
  const show = (on) => marks.forEach((mark) => mark.classList.toggle("dim", on && mark.dataset.s !== item.dataset.for));
  for (const event of ["pointerenter", "focus"]) item.addEventListener(event, () => show(true));
  for (const event of ["pointerleave", "blur"]) item.addEventListener(event, () => show(false));
}

/* Pointing at a timeline, or walking along it with the arrow keys, reads out one of its points; otherwise its peak is told. */
for (const panel of document.querySelectorAll(".timeline")) {
  const { x, y, at, bytes, name, names } = JSON.parse(panel.dataset.points);
  const picture = panel.querySelector("svg"), line = picture.querySelector(".cursor path"), dot = picture.querySelector(".cursor circle");
  const [value, place, where] = panel.querySelector(".readout").children;
  const peak = bytes.indexOf(Math.max(...bytes)), number = (n, least, most) => n.toLocaleString("en", { minimumSignificantDigits: least, maximumSignificantDigits: most });
  const position = ([start, end, low, high], n) => start + ((n - low) / (high - low)) * (end - start);
  let shown = peak;

  const show = (n) => {
    shown = n;
    value.textContent = `${number(bytes[n] / 2 ** 20, 3, 4)} MiB`;
    place.textContent = `operation ${number(at[n], 1, 16)}${n === peak ? ", peak" : ""}`;
    where.textContent = names[name[n]];
    line.setAttribute("transform", `translate(${position(x, at[n])})`);
    dot.setAttribute("transform", `translate(${position(x, at[n])} ${position(y, bytes[n])})`);
    panel.setAttribute("aria-valuenow", at[n]);
    panel.setAttribute("aria-valuetext", [value, place, where].map((part) => part.textContent).join(", "));
  };
  const point = (event) => {
    const box = picture.getBoundingClientRect(), [start, end, low, high] = x;
    const operation = low + ((((event.clientX - box.left) / box.width) * picture.viewBox.baseVal.width - start) / (end - start)) * (high - low);
    panel.classList.add("on");
    show(at.reduce((best, n, place) => (Math.abs(n - operation) < Math.abs(at[best] - operation) ? place : best), 0));
  };
  const rest = () => { panel.classList.remove("on"); show(peak); };

  for (const tip of picture.querySelectorAll("path > title")) tip.remove();
  const roles = { tabindex: 0, role: "slider", "aria-label": panel.querySelector("h4").textContent, "aria-valuemin": at[0], "aria-valuemax": at.at(-1) };
  for (const [key, text] of Object.entries(roles)) panel.setAttribute(key, text);
  for (const event of ["pointerdown", "pointermove"]) picture.addEventListener(event, point);
  picture.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== panel) rest(); });
  panel.addEventListener("focus", () => panel.classList.add("on"));
  panel.addEventListener("blur", rest);
  panel.addEventListener("keydown", (event) => {
    const pace = event.shiftKey ? 10 : 1;
    const target = { ArrowLeft: shown - pace, ArrowDown: shown - pace, ArrowRight: shown + pace, ArrowUp: shown + pace, Home: 0, End: at.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(Math.min(at.length - 1, Math.max(0, target)));
  });
  rest();
}
