// Apply IPAdapter-Instruct shows the scales of three-way guidance only where it is chosen.
import { app } from "../../../scripts/app.js";

const SCALES = ["instruct_scale", "image_scale"];

function showScales(node) {
  const named = (name) => node.widgets?.find((widget) => widget.name === name);
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const hidden = named("guidance")?.value !== "three-way" && !linked("guidance");
  for (const widget of SCALES.map(named)) {
    if (!widget) continue;
    widget.hidden = hidden && !linked(widget.name);
    (widget.options ??= {}).hidden = widget.hidden; // which the newer design reads
    // The page's older design keeps the room of what is hidden, but for a size of its own.
    if (widget.hidden) widget.computeSize = () => [0, -4];
    else delete widget.computeSize;
  }
  app.canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "ipadapter_instruct.guidance",
  nodeCreated(node) {
    if (node.comfyClass !== "IPAdapterInstructApply") return;
    const guidance = node.widgets?.find((widget) => widget.name === "guidance");
    if (!guidance) return;
    for (const [owner, event] of [[guidance, "callback"], [node, "onConfigure"], [node, "onConnectionsChange"]]) {
      const before = owner[event];
      owner[event] = function (...args) {
        const result = before?.apply(this, args);
        showScales(node);
        return result;
      };
    }
    showScales(node);
  },
});
