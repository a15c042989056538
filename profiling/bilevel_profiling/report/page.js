/* Pointing at an estimator in a legend fades the others in that case's figures. */
for (const item of document.querySelectorAll("[data-for]")) {
  const marks = item.closest(".case").querySelectorAll("[data-s]");
  const show = (on) => marks.forEach((mark) => mark.classList.toggle("dim", on && mark.dataset.s !== item.dataset.for));
  for (const event of ["pointerenter", "focus"]) item.addEventListener(event, () => show(true));
  for (const event of ["pointerleave", "blur"]) item.addEventListener(event, () => show(false));
}
