"""HAM's grouping, pruning and merging of a PEFT model's adapters (`pip install peft`).

The groups come back as one LoRA adapter, with the same outputs. Training is yours; PEFT has no α:
its lora_alpha / r goes into B. It draws a new A for each adapter, HAM starts all from one: cosines
of adapters with another start are lower. R, the rank of a group, keeps factors from growing until
a layer is smaller as a matrix, which no adapter could hold. To be copied, beside ham.py.
"""

import peft
import timm

import ham

vit = timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True, num_classes=0)
method = ham.HAM({}, ham.Config(g_max=2, group_rank=16))
for task in range(3):
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"])
    model = peft.get_peft_model(vit, lora)
    # train it here
    state, scaling = peft.get_peft_model_state_dict(model), lora.lora_alpha / lora.r
    names = [x.removesuffix(".lora_A.weight") for x in state if x.endswith(".lora_A.weight")]
    adapter = {
        n: (scaling * state[f"{n}.lora_B.weight"], state[f"{n}.lora_A.weight"]) for n in names
    }
    groups = [ham.flat(group.delta_w) for group in method.groups]
    j = method.choose(task, ham.cosine_similarity(ham.flat(adapter), groups))
    if j == len(groups):
        method.groups.append(ham.Group({}))
    method.join(method.groups[j], task, adapter, alpha=1.0)
    vit = model.unload()
scales = [group.alpha for group in method.groups]
merged = {n: ham.merge([g.delta_w[n] for g in method.groups], scales) for n in names}
rank = merged[names[0]][0].shape[1]
model = peft.get_peft_model(vit, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"]))
state = {f"{n}.lora_{x}.weight": w for n, ba in merged.items() for x, w in zip("BA", ba)}
peft.set_peft_model_state_dict(model, state)
