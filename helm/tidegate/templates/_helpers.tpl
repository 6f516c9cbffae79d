{{- /* Names, labels and the blocks that several templates share. */ -}}

{{- define "tidegate.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* At most 40 characters, so that every name made from it fits into 63. */ -}}
{{- define "tidegate.fullname" -}}
{{- $name := include "tidegate.name" . -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* Labels of an object of this release. Arguments: context, component. */ -}}
{{- define "tidegate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .context.Chart.Name .context.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .context.Release.Service }}
{{ include "tidegate.selector" . }}
{{- end }}

{{- /* What never changes in an object's life. Arguments: context, component. */ -}}
{{- define "tidegate.selector" -}}
app.kubernetes.io/name: {{ include "tidegate.name" .context }}
app.kubernetes.io/instance: {{ .context.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* An image reference. Arguments: context, name (gateway, operator or ray). */ -}}
{{- define "tidegate.image" -}}
{{- $image := .context.Values.image -}}
{{- index $image .name | default (printf "%s/%s:%s" $image.registry .name ($image.tag | default .context.Chart.AppVersion)) -}}
{{- end }}

{{- define "tidegate.serviceAccount" -}}
{{- $account := (index .context.Values .component).serviceAccount -}}
{{- $own := printf "%s-%s" (include "tidegate.fullname" .context) .component -}}
{{- $account.name | default (ternary $own "default" $account.create) -}}
{{- end }}

{{- /* The namespaces whose Models and Pools the operator keeps, as a JSON list for fromJsonArray. */ -}}
{{- define "tidegate.namespaces" -}}
{{- .Values.operator.namespaces | default (list .Release.Namespace) | uniq | toJson -}}
{{- end }}

{{- define "tidegate.adminKeySecret" -}}
{{- .Values.adminKey.existingSecret | default (printf "%s-admin-key" (include "tidegate.fullname" .)) -}}
{{- end }}

{{- define "tidegate.controlKeySecret" -}}
{{- if .Values.controlApi.enabled -}}
{{- .Values.controlApi.existingSecret | default (printf "%s-control-key" (include "tidegate.fullname" .)) -}}
{{- end -}}
{{- end }}

{{- define "tidegate.redisSecret" -}}
{{- .Values.redis.auth.existingSecret | default (printf "%s-redis" (include "tidegate.fullname" .)) -}}
{{- end }}

{{- /* Where Ray keeps its head's state; empty: nowhere. */ -}}
{{- define "tidegate.gcsAddress" -}}
{{- if .Values.gcsRedis.enabled -}}
{{ include "tidegate.fullname" . }}-gcs-redis.{{ .Release.Namespace }}.svc:6379
{{- else -}}
{{ .Values.gcsRedis.externalAddress }}
{{- end -}}
{{- end }}

{{- /* The Secret with its password, in each watched namespace; empty: it has none. */ -}}
{{- define "tidegate.gcsSecret" -}}
{{- if or .Values.gcsRedis.enabled .Values.gcsRedis.auth.existingSecret -}}
{{- .Values.gcsRedis.auth.existingSecret | default (printf "%s-gcs-redis" (include "tidegate.fullname" .)) -}}
{{- end -}}
{{- end }}

{{- define "tidegate.isCaMounted" -}}
{{- if and (not .Values.redis.enabled) .Values.externalRedis.tls.enabled .Values.externalRedis.tls.caSecret }}true{{ end -}}
{{- end }}

{{- /* Where the queue is, and its user and password apart: no manifest holds the password, and in no URL would one
       with special characters have to be encoded. */ -}}
{{- define "tidegate.redisEnv" -}}
{{- $external := .Values.externalRedis -}}
{{- if $external.existingSecretUrlKey | and (not .Values.redis.enabled) -}}
{{- $secret := required "externalRedis.existingSecretUrlKey needs externalRedis.existingSecret" $external.existingSecret -}}
{{- include "tidegate.fromSecret" (dict "name" "REDIS_URL" "secret" $secret "key" $external.existingSecretUrlKey) }}
{{- else -}}
- name: REDIS_URL
  value: {{ include "tidegate.redisUrl" . }}
{{- with $external.username | and (not .Values.redis.enabled) }}
- name: REDIS_USERNAME
  value: {{ $external.username | quote }}
{{- end }}
{{- with include "tidegate.queueSecret" . }}
{{- if $external.existingSecretUsernameKey | and (not $.Values.redis.enabled) }}
{{ include "tidegate.fromSecret" (dict "name" "REDIS_USERNAME" "secret" . "key" $external.existingSecretUsernameKey) }}
{{- end }}
{{ include "tidegate.fromSecret" (dict "name" "REDIS_PASSWORD" "secret" . "key" (include "tidegate.queueSecretKey" $)) }}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* One variable. Arguments: name, secret, key. */ -}}
{{- define "tidegate.fromSecret" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end }}

{{- define "tidegate.redisUrl" -}}
{{- $external := .Values.externalRedis -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "tidegate.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{- $scheme := ternary "rediss" "redis" $external.tls.enabled -}}
{{- $place := "" -}}
{{- with $external.sentinel -}}
{{- if .master -}}
{{- $scheme = printf "%s+sentinel" $scheme -}}
{{- $hosts := list -}}
{{- range .hosts -}}
{{- $hosts = append $hosts (printf "%s:%d" . (int $external.sentinel.port)) -}}
{{- end -}}
{{- $place = printf "%s/%s" (required "externalRedis.sentinel.hosts: say where the Sentinels are" (join "," $hosts)) .master -}}
{{- else -}}
{{- $place = printf "%s:%d" (required "externalRedis.host: redis.enabled is false, so say where Redis is, or set externalRedis.sentinel or externalRedis.existingSecretUrlKey" $external.host) (int $external.port) -}}
{{- end -}}
{{- end -}}
{{- printf "%s://%s/%d%s" $scheme $place (int $external.database) (ternary "?ssl_ca_certs=/etc/tidegate/redis-ca/ca.crt" "" (eq (include "tidegate.isCaMounted" .) "true")) -}}
{{- end -}}
{{- end }}

{{- define "tidegate.caVolume" -}}
{{- if include "tidegate.isCaMounted" . -}}
- name: redis-ca
  secret:
    secretName: {{ .Values.externalRedis.tls.caSecret }}
    items:
      - key: {{ .Values.externalRedis.tls.caSecretKey }}
        path: ca.crt
{{- end -}}
{{- end }}

{{- define "tidegate.caMount" -}}
{{- if include "tidegate.isCaMounted" . -}}
- name: redis-ca
  mountPath: /etc/tidegate/redis-ca
  readOnly: true
{{- end -}}
{{- end }}

{{- /* Pod Security "restricted". Argument: the user's id. */ -}}
{{- define "tidegate.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tidegate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* On different nodes where there are some. Arguments: context, component. */ -}}
{{- define "tidegate.spread" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "tidegate.selector" . | nindent 12 }}
{{- end }}

{{- define "tidegate.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end -}}
{{- end }}

{{- /* Where a pod may run. Argument: the values of the component. */ -}}
{{- define "tidegate.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- /* A number as written: Helm reads large ones as floats, which print as 5.3e+08. */ -}}
{{- define "tidegate.plain" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end }}

{{- /* Environment variables of a map of settings: maxBodyBytes becomes TIDEGATE_MAX_BODY_BYTES. */ -}}
{{- define "tidegate.settings" -}}
{{- range $name, $value := . }}
- name: TIDEGATE_{{ $name | snakecase | upper }}
  value: {{ include "tidegate.plain" $value | quote }}
{{- end }}
{{- end }}

{{- /* A Secret as it stands: its `data`, empty without a cluster. Arguments: context, secret. */ -}}
{{- define "tidegate.secretData" -}}
{{- $found := lookup "v1" "Secret" .context.Release.Namespace .secret -}}
{{- ($found | default dict).data | default dict | toJson -}}
{{- end }}

{{- /* A Secret's value that stays as it is on upgrade. One that is new is the same wherever it is asked for in one
       rendering. Arguments: context, secret, key, length, prefix. */ -}}
{{- define "tidegate.kept" -}}
{{- $data := include "tidegate.secretData" . | fromJson -}}
{{- $made := .context.Values.global | default dict -}}
{{- $name := printf "tidegate/%s/%s" .secret .key -}}
{{- if not (hasKey $made $name) -}}
{{- $_ := set $made $name (index $data .key | default (printf "%s%s" (.prefix | default "") (randAlphaNum .length) | b64enc)) -}}
{{- $_ := set .context.Values "global" $made -}}
{{- end -}}
{{- index $made $name -}}
{{- end }}

{{- /* The Secret of the queue's password or URL; empty: there is none. */ -}}
{{- define "tidegate.queueSecret" -}}
{{- if .Values.redis.enabled -}}{{ include "tidegate.redisSecret" . }}{{- else -}}{{ .Values.externalRedis.existingSecret }}{{- end -}}
{{- end }}

{{- /* The key of the password in it, or of the URL. */ -}}
{{- define "tidegate.queueSecretKey" -}}
{{- if .Values.redis.enabled -}}{{ .Values.redis.auth.existingSecretKey }}
{{- else -}}{{ .Values.externalRedis.existingSecretUrlKey | default .Values.externalRedis.existingSecretPasswordKey }}
{{- end -}}
{{- end }}

{{- define "tidegate.caSecret" -}}
{{- if include "tidegate.isCaMounted" . }}{{ .Values.externalRedis.tls.caSecret }}{{ end -}}
{{- end }}

{{- /* An annotation that changes with what Secrets hold, so that an upgrade restarts the pods that read them.
       Arguments: context, secrets (names; empty ones are left out). */ -}}
{{- define "tidegate.secretsAnnotation" -}}
{{- $context := .context -}}
{{- $held := dict -}}
{{- range compact .secrets -}}
{{- $data := include "tidegate.secretData" (dict "context" $context "secret" .) | fromJson -}}
{{- /* The first install writes its own after this was rendered. */ -}}
{{- if eq . (printf "%s-admin-key" (include "tidegate.fullname" $context)) -}}
{{- $key := $context.Values.adminKey.existingSecretKey -}}
{{- $data = dict $key (include "tidegate.kept" (dict "context" $context "secret" . "key" $key "length" 43 "prefix" "tg-")) -}}
{{- else if eq . (printf "%s-control-key" (include "tidegate.fullname" $context)) -}}
{{- $key := $context.Values.controlApi.existingSecretKey -}}
{{- $data = dict $key (include "tidegate.kept" (dict "context" $context "secret" . "key" $key "length" 43 "prefix" "tg-")) -}}
{{- else if eq . (printf "%s-redis" (include "tidegate.fullname" $context)) -}}
{{- $key := $context.Values.redis.auth.existingSecretKey -}}
{{- $data = dict $key (include "tidegate.kept" (dict "context" $context "secret" . "key" $key "length" 40)) -}}
{{- else if eq . (printf "%s-gcs-redis" (include "tidegate.fullname" $context)) -}}
{{- $key := $context.Values.gcsRedis.auth.existingSecretKey -}}
{{- $data = dict $key (include "tidegate.kept" (dict "context" $context "secret" . "key" $key "length" 40)) -}}
{{- end -}}
{{- $_ := set $held . $data -}}
{{- end -}}
tidegate.dev/secrets: {{ toJson $held | sha256sum | trunc 16 | quote }}
{{- end }}

{{- /* The address families of a Service. */ -}}
{{- define "tidegate.ipFamilies" -}}
{{- with .Values.ipFamilyPolicy -}}
ipFamilyPolicy: {{ . }}
{{ end -}}
{{- with .Values.ipFamilies -}}
ipFamilies: {{ toJson . }}
{{- end -}}
{{- end }}
