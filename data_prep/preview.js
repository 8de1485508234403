"use strict";
// The address holds the filters (#condition=dent&role=decision_maker), so that a view can be shared as a link.
const form = document.getElementById("filters");
const selects = [...form.querySelectorAll("select")];
const cases = [...document.querySelectorAll("li.case")];

function applyFilters() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const select of selects) select.value = wanted.get(select.name) ?? "";
  const role = wanted.get("role");
  let shown = 0;
  for (const item of cases) {
    const fits = [...wanted].every(([key, value]) =>
      key === "role" ? item.dataset.role.split(" ").includes(value) : item.dataset[key] === value);
    item.hidden = !fits;
    shown += fits;
    for (const details of item.querySelectorAll("details")) {
      details.hidden = role !== null && details.dataset.of !== role;
      if (role !== null) details.open = !details.hidden;
    }
  }
  document.getElementById("shown").textContent = `${shown} of ${cases.length} shown`;
}

function setFilters(wanted) {
  history.replaceState(null, "", "#" + wanted);
  applyFilters();
}

function applyAndScroll() {
  applyFilters();
  document.getElementById("heading").scrollIntoView();
}

form.addEventListener("change", event => {
  if (event.target.id === "outlines") document.body.classList.toggle("plain", !event.target.checked);
  else setFilters(new URLSearchParams(selects.filter(select => select.value).map(select => [select.name, select.value])));
});
form.addEventListener("submit", event => event.preventDefault());  // Enter in the checkbox
form.addEventListener("reset", () => { document.body.classList.remove("plain"); setFilters(""); });
for (const button of document.querySelectorAll("button[data-filter]")) button.addEventListener("click", () => {
  history.replaceState(null, "", "#" + new URLSearchParams([[button.dataset.filter, button.dataset.value]]));
  applyAndScroll();
});
addEventListener("hashchange", applyAndScroll);
form.hidden = false;
if (location.hash) applyAndScroll(); else applyFilters();
