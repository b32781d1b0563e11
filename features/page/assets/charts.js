// Draws every chart of the page by Vega-Lite, and draws it again when the page turns light or dark.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = {
    light: ["#1f5fa8", "#c2570c", "#2a7f4f", "#8a3fa0", "#b3253f", "#0e7c86", "#7a5c00", "#5a6570"],
    dark: ["#79b4f2", "#f2a15f", "#74cf9a", "#cf9be6", "#f58a9c", "#62cdd6", "#d9bd57", "#aab4bc"],
  };

  function config(width) {
    const ink = colour("--ink"), faint = colour("--faint"), line = colour("--line");
    const ramp = dark.matches ? ["#1e3247", "#a5cffa"] : ["#e4eefa", "#0b4a94"];
    const palette = dark.matches ? series.dark : series.light;
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: faint, titleColor: faint, labelFont: font, titleFont: font, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 };
    return {
      background: "transparent", font,
      view: { stroke: null },
      axis: { ...text, domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.6, labelLimit: width < 420 ? 120 : 240 },
      axisY: { minExtent: 34 },
      legend: { ...text, labelColor: ink, orient: "top", title: null, labelLimit: width / 2 - 40, symbolType: "stroke", symbolSize: 300, symbolStrokeWidth: 2, columns: width < 420 ? 2 : 3 },
      header: text,
      title: { color: ink, font, anchor: "start" },
      range: { category: palette, heatmap: ramp, ramp },
      line: { strokeWidth: 1.8 }, rule: { color: faint }, text: { color: ink, font },
      mark: { color: palette[0] }, area: { opacity: 0.22 },
    };
  }

  async function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const place = figure.querySelector(".drawing");
    await vegaEmbed(place, spec, {
      actions: false, renderer: "svg", ast: true, defaultStyle: false, config: config(place.clientWidth),
      tooltip: { disableDefaultStyle: true },
      loader: { load: () => Promise.reject(new Error("this page loads nothing")) },
    });
    figure.dataset.drawn = "yes";
  }

  const drawAll = async () => { for (const figure of document.querySelectorAll("figure.chart")) await draw(figure); };
  dark.addEventListener("change", drawAll);
  drawAll();
})();
