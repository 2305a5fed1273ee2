#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) on Deformable DETR with four levels and 300 queries, fine-tuned on PASCAL VOC.
# Published: AP 61.2; settings not published. Here as for Deformable DETR.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --epochs 50 --lr_drop 40 --dataset_file voc_coco \
    --pretrain exps/r50_deformtr_ms_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w/checkpoint.pth \
    --output_dir exps/Siamese_deformable_finetune_voc "$@"
