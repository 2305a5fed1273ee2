#!/bin/sh
# Pre-train under SLURM, with the arguments of Siamese DETR's script of this name:
#   sh tools/srun_train.sh PARTITION CONFIG NUM_GPU JOB_NAME [FLAGS ...]
# CONFIG is a config of this project, or the path of a published one, such as configs/selfsup/siamese_detr/main/NAME.py.
[ $# -ge 4 ] || { echo "error: usage: $0 PARTITION CONFIG NUM_GPU JOB_NAME [FLAGS ...]" >&2; exit 2; }
root="$(cd "$(dirname "$0")/.." && pwd)" partition="$1" config="$2" gpus="$3" job="$4"
shift 4
name="$(basename "$config" | sed 's/\.[ps][yh]$//')"
case "$name" in  # UP-DETR's pretext in that codebase
    r50_vanillatr_imgnet_gpu16_step30w) name=UPDETR_vanilla_pretrain_in ;;
    r50_condtr_100q_imgnet_gpu16_step30w) name=UPDETR_conditional_pretrain_in ;;
    r50_condtr_300q_imgnet_gpu16_step30w) name=UPDETR_conditional_300q_pretrain_in ;;
    r50_deformtr_ms_300q_imgnet_gpu32_step30w) name=UPDETR_deformable_pretrain_in ;;
    r50_deformtr_ss_300q_imgnet_gpu32_step30w) name=UPDETR_deformable_single_scale_pretrain_in ;;
    r50_condtr_100q_coco_gpu16_step12w) name=UPDETR_conditional_pretrain_coco ;;
    r50_condtr_100q_coco_edgebox_gpu16_step12w) name=UPDETR_conditional_edgebox_pretrain_coco ;;
esac
[ -f "$root/configs/$name.sh" ] || { echo "error: no config $name: see docs/experiments.md" >&2; exit 2; }
exec bash "$root/tools/run_dist_slurm.sh" "$partition" "$job" "$gpus" "$root/configs/$name.sh" "$@"
