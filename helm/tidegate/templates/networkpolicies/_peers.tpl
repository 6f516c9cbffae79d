{{- /* DNS wherever it runs: some clusters run it on the nodes themselves. */ -}}
{{- define "tidegate.egressDns" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}

{{- /* Egress to addresses. Arguments: cidrs (none: everywhere), ports. */ -}}
{{- define "tidegate.egressTo" -}}
- ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
  {{- with .cidrs }}
  to:
    {{- range . }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  {{- end }}
{{- end }}

{{- define "tidegate.egressApiServer" -}}
{{ include "tidegate.egressTo" .Values.networkPolicy.apiServer }}
{{- end }}

{{- /* To the queue's Redis, the built-in or the other one. */ -}}
{{- define "tidegate.egressRedis" -}}
{{- if .Values.redis.enabled -}}
- ports:
    - {protocol: TCP, port: 6379}
  to:
    - {{ include "tidegate.peer" (dict "context" . "component" "redis") | nindent 6 | trim }}
{{- else -}}
{{- $external := .Values.externalRedis -}}
{{- $ports := list $external.port -}}
{{- if or $external.sentinel.master $external.existingSecretUrlKey -}}
{{- $ports = append $ports $external.sentinel.port -}}
{{- end -}}
{{ include "tidegate.egressTo" (dict "cidrs" .Values.networkPolicy.externalRedis.cidrs "ports" $ports) }}
{{- end -}}
{{- end }}

{{- /* The pods of one component of this release, from any namespace. Arguments: context, component. */ -}}
{{- define "tidegate.peer" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .context.Release.Namespace }}
podSelector:
  matchLabels:
    {{- include "tidegate.selector" . | nindent 4 }}
{{- end }}

{{- /* Ray's pods in all watched namespaces. */ -}}
{{- define "tidegate.rayPeer" -}}
namespaceSelector:
  matchExpressions:
    - key: kubernetes.io/metadata.name
      operator: In
      values: {{ include "tidegate.namespaces" . }}
podSelector:
  {{- include "tidegate.raySelector" . | nindent 2 }}
{{- end }}

{{- /* Heads, workers and KubeRay's clean-up of a head's state carry it. */ -}}
{{- define "tidegate.raySelector" -}}
matchExpressions:
  - {key: tidegate.dev/pool, operator: Exists}
  - {key: ray.io/cluster, operator: Exists}
{{- end }}
