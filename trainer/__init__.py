from trainer import lean

lean.install()
