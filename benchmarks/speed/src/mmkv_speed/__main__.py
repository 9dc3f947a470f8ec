from .cli import app

app(prog_name="python -m mmkv_speed")
