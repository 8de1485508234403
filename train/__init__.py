"""Commands that train and export adapters."""

from echo_ft.processes import end_imports_on_ctrl_c

end_imports_on_ctrl_c()
