// Packs that fill inputs from afar ask a node whether an input wants to be filled. prompt_clip stays empty beside a
// clip that is wired by hand, and that reads prompts itself: with a LoRA on it, say.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "ipadapter_instruct.everywhere",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("IPAdapterInstruct")) return;
    const place = node.inputs?.findIndex((input) => input.name === "clip") ?? -1;
    if (place < 0 || !node.inputs.some((input) => input.name === "prompt_clip")) return;
    node.reject_ue_connection = (input) => {
      const link = input.name === "prompt_clip" && node.getInputLink(place);
      return Boolean(link) && node.getInputNode(place)?.outputs[link.origin_slot]?.type === "CLIP";
    };
  },
});
