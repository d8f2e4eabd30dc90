"""The refinement engine: every image of an input once, by any number of workers, labels carried along.

From the top, each using only what stands below it:

- `run` refines a job, by this process or by `local_workers` or `ray_workers`; each worker is a `worker_loop`.
- `worker` does work units, through `batching` and `writing`; `stages` has its threads, `image_refiner` drives R.
- `session` opens a run: the `job`, its `RunDirectory`, the source (`sources`) and the sink (`sinks`).
- `run_opening`, `run_directory`, `lease`, `manifest` and `records` are a run on the disk; `verification` checks it.
"""
