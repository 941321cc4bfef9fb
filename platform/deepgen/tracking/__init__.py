"""Records of a run: MLflow, the local journal, pictures, tables and progress lines.

Every number goes to `<run.dir>/<run.name>/metrics.jsonl` first and to MLflow in the background, so an unreachable
tracking server costs neither a metric nor a second of training. Metric names (MLflow groups them by the part before the
slash, the curves select them by name):

| name | meaning |
|---|---|
| reward/<name>, reward/total                  | mean raw score of the step's samples; weighted over the rewards |
| reward_spread/<name>                         | standard deviation of a reward within a group, mean over groups |
| reward_weight/<name>                         | mean weight of a reward, over the samples that it is asked about |
| reward_missing/<name>                        | missing scores in this step |
| reward_spread/<name>                         | mean standard deviation of the scores within a group |
| reward_held_out/<name>, reward_held_out/total | as reward/<name>, of rewards that are never trained on |
| agreement/<trained>/<held-out>               | mean rank correlation (Kendall) of the two within a group |
| advantage/std, advantage/zero_spread/<name>  | spread of advantages, share of groups without spread |
| advantage/share/<name>                       | which reward moves the policy: its share of the differences between |
|                                              | the advantages of a group; all together 1 (`algorithms.advantages`) |
| policy/ratio_{mean,max,deviation_max}        | probability ratio of the update, largest distance from 1 |
| policy/clip_share, policy/kl                 | share of clipped samples, KL to the reference |
| policy/staleness_max                         | steps between the policy that drew and the one that learns |
| policy/importance_{mean,max,capped_share}    | weights of the decoupled loss before the cap, share of capped ones |
| policy/truncated_share                       | share of the off-policy samples' transitions that is left out |
| loss/total, loss/policy, loss/kl, loss/sft, loss/flow_matching | losses |
| data/quarantined_sum, data/quarantined_{prompts,heldout} | bad training records of the step, prompts left out |
| data/cut_prompts_sum                         | training prompts of the step that are longer than the policy reads |
| train/grad_norm, train/learning_rate         | optimizer; the norm is the mean over the updates of a batch |
| train/skipped_updates                        | updates of the run so far left out because they were not finite |
| time/<phase>_s                               | seconds per phase; reward: the wait after the last image |
| throughput/images_per_s, throughput/rollout_images_per_s | images per second, trained on and drawn |
| idle/<role>                                  | share of the time from the learner's batch before to this one in |
|                                              | which an actor of the role had no call, mean over actors: rollout, |
|                                              | each reward pool by name; learner: share in which it waited for it |
| pool/<reward>/<counter>, rollout/restarts    | counters of the reward pools and the rollout fleet |
| rollout/actors                               | rollout actors that could get a call               |
| pool/<reward>/{asked,scored}                 | images the reward was asked about, those with a score: the |
|                                              | others are missing |
| pool/<reward>/missing/<reason>               | missing scores since the start, by reason (`rewards.base.REASONS`) |
| journal/groups_{written,read}, journal/bytes_written, journal/skipped | counters of `experience.journal` |
| eval/<reward>, eval/total                    | mean on the fixed held-out prompts |
| eval_held_out/<reward>, eval_held_out/total  | the same, of rewards that are never trained on |
"""
