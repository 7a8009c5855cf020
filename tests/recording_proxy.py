"""A proxy that records what a process would send to the internet."""

import contextlib
import socket
import threading


@contextlib.contextmanager
def recording_proxy(home):
    """Run a proxy that accepts connections, records what they request, and closes them.

    Yields the environment variables that direct a process to it, and the list of recorded requests. `home` is the
    process's HOME, so that tests can check that nothing about the machine is stored there.
    """
    attempts = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def record():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        with contextlib.suppress(OSError):
                            attempts.append(connection.recv(4096))

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        towards = {variable: url for name in names for variable in (name, name.upper())}
        yield (
            {**towards, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "NO_PROXY": "", "no_proxy": ""},
            attempts,
        )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
