"""Commands that run and score models."""

from echo_ft.processes import end_imports_on_ctrl_c

end_imports_on_ctrl_c()
