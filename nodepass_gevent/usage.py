"""What the command says of its use: the forms of a call, and examples."""

EXAMPLES = """\
Of several sources the first one counts: option, URL query, environment, [tunnel NAME] in the file, [nodepass] in it.
URL query and file have the options' names without --. A TIME is written 5s, 1h30m or 100ms.

examples:
  nodepass 'server://:10101/127.0.0.1:8080?tls=1'
  nodepass 'client://tunnel.example.com:10101/127.0.0.1:80?log=debug'
  SEMAPHORE_LIMIT=4096 nodepass 'server://[::1]:10101/:8443?tls=2&crt=/etc/nodepass/cert.pem&key=/etc/nodepass/key.pem'
  nodepass --config /etc/nodepass/nodepass.conf --show-config
  nodepass check --config /etc/nodepass/conf.d    # what would go wrong with these tunnels
  nodepass status --status 127.0.0.1:9100 --watch    # how the process with status=127.0.0.1:9100 is
  nodepass generate supervisor web 'server://:10101/:8080' > web.conf && mv web.conf /etc/supervisor/conf.d/
  nodepass genkey > tunnel.key    # a key for tunnel-key-file; umask 077 keeps others out
"""
USAGE = """\
nodepass [options] 'server://<tunnel_addr>/<target_addr>[?key=value&...]'
       nodepass [options] 'client://<tunnel_addr>/<target_addr>[?key=value&...]'
       nodepass [options] --config FILE|DIRECTORY [--only NAME]
       nodepass check [options] [URL] [--json]
       nodepass status [--watch] [--json] --status HOST:PORT|--config FILE
       nodepass health [--ready] --status HOST:PORT|--config FILE
       nodepass genkey
       nodepass generate supervisor NAME [--numprocs N] [options] URL|--config FILE
       nodepass generate systemd NAME [--user] [options] URL|--config FILE
       nodepass generate config|systemd-template"""
