"""Records of a run: MLflow, the local journal, pictures, tables and progress lines.

Every number goes to `<run.dir>/<run.name>/metrics.jsonl` first and to MLflow in the background, so a tracking server
that is away costs neither a metric nor a second of training. Names of metrics (MLflow groups them by what stands
before the slash, the curves pick them by these names):

| name | meaning |
|---|---|
| reward/<name>                                | mean raw score of the step's samples |
| reward_normalised/<name>                     | mean absolute advantage part of this reward after normalisation |
| reward_missing/<name>                        | scores that could not be had in this step |
| advantage/std, advantage/zero_spread/<name>  | spread of advantages, share of groups without spread |
| policy/ratio_mean, policy/ratio_max          | probability ratio of the update |
| policy/clip_share, policy/kl                 | share of clipped samples, KL to the reference |
| loss/total, loss/policy, loss/kl, loss/sft, loss/flow_matching | losses |
| train/grad_norm, train/learning_rate         | optimizer |
| time/<phase>_s, throughput/images_per_s      | seconds per phase, images per second |
| eval/<reward>                                | mean on the fixed held-out prompts |
"""
